"""Losses that were taken out of a step wrongly are noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.tasks import TrainingStepTask
from tests.cases.tasks import INPUTS, LABELS, Step

BATCH = (INPUTS, LABELS)


class Doubled(TrainingStepTask):
    def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
        return 2 * super().train_loss(module, batch)


class Detached(TrainingStepTask):
    """Right values, and gradients that lack a part."""

    def batch_loss(self, module: nn.Module, batch: Any, by_position: bool = False) -> Any:
        total, parts = super().batch_loss(module, batch, by_position)
        return total, 0.5 * parts + 0.5 * parts.detach()


class Swapped(TrainingStepTask):
    def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
        return super().train_loss(module, batch).roll(1)


class Short(TrainingStepTask):
    def batch_loss(self, module: nn.Module, batch: Any, by_position: bool = False) -> Any:
        total, parts = super().batch_loss(module, batch, by_position)
        return total, parts * (torch.arange(len(parts)) > 0)


class Exchanged(TrainingStepTask):
    """Right values, each with the gradient of another example's: the batch's gradient is right."""

    def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
        losses = super().train_loss(module, batch)
        other = losses.roll(1)
        return losses.detach() + other - other.detach()


@pytest.mark.parametrize("kind", [Doubled, Detached, Swapped, Short, Exchanged])
def test_wrong_losses_are_refused(kind: type[TrainingStepTask]) -> None:
    torch.manual_seed(0)
    module = Step(lambda s, x, y: F.cross_entropy(s(x), y))
    TrainingStepTask().prepare(module, BATCH)
    with pytest.raises(UnsupportedTrainingError, match="not made of losses of single examples"):
        kind().prepare(module, BATCH)


def test_the_parts_of_a_sum_beside_a_mean() -> None:
    """Each is an example's share of the gradient of a full batch."""
    torch.manual_seed(0)
    module = Step(lambda s, x, y: F.cross_entropy(s(x), y) + 0.1 * s(x).square().sum())
    task = TrainingStepTask()
    task.training_batch_size = 4
    task.prepare(module, BATCH)
    own = F.cross_entropy(module(INPUTS), LABELS, reduction="none")
    wanted = own + 4 * 0.1 * module(INPUTS).square().sum(1)
    torch.testing.assert_close(task.train_loss(module, BATCH), wanted)


def test_a_loss_in_single_precision_of_a_model_in_double() -> None:
    """As that of every language model of transformers: its rounding is no dependence."""
    torch.manual_seed(0)
    module = Step(lambda s, x, y: F.cross_entropy(s(x).float() * 1000, y)).double()
    batch = (INPUTS.double(), LABELS)
    task = TrainingStepTask()
    task.prepare(module, batch)
    own = F.cross_entropy(module(batch[0]).float() * 1000, LABELS, reduction="none")
    torch.testing.assert_close(task.train_loss(module, batch), own, check_dtype=False)
    with pytest.raises(UnsupportedTrainingError, match="not made of losses of single examples"):
        Doubled().prepare(module, batch)
