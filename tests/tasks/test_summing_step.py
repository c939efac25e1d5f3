"""Training steps that sum over their batch, where the last batch of an epoch is a smaller one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning.estimators import Source
from tda_lightning.evaluation import landing_error, retrain
from tda_lightning.tasks import AttributionTask, RegressionTask, TrainingStepTask
from tests import oracles
from tests.attributing import attribute, relative
from tests.cases import Case
from tests.cases.case import normal
from tests.cases.training import OPTIMIZERS, everything, queries_of

BATCH = 4  # ten examples: the last batch holds two


class Summing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1], reduction="sum") / 2


CASE = Case("summing", Summing, normal(3))


def summed(module: nn.Module, batch: Any) -> Tensor:
    """What a batch's mean is taken of."""
    return len(batch[0]) * CASE.loss(module, batch)


def train(optimizer, checkpoints):
    module, data = CASE.build(), CASE.batch(10)
    batches = oracles.cut_batches(10, BATCH, epochs=3)
    run = oracles.record_run(module, summed, data, optimizer, batches, checkpoints)
    return run, module, data


@pytest.mark.parametrize("optimizer", ["decay", "momentum"])
def test_recorded_order_of_a_sum(optimizer) -> None:
    run, module, data = train(OPTIMIZERS[optimizer], checkpoints=(2, 5))
    segments, curvature, gradients, query = everything(CASE, run, module, data, [4])

    def shares(row: int) -> Tensor:
        used = torch.cat(run.steps.batches(row))
        return torch.bincount(used, minlength=10).double()

    expected = oracles.source_recorded(
        run,
        segments,
        [BATCH * matrix for matrix in curvature],
        gradients,
        query,
        oracles.interpolated(run.checkpoints),
        shares,
    )
    estimator = Source(segment_steps=[4], curvature="exact", order="recorded")
    scores = attribute(CASE, run, module, data, estimator, task=TrainingStepTask(), batch_size=3)
    assert any("sums its loss over batches of 4" in note for note in scores.provenance["notes"])
    assert relative(scores.by_segment, expected) < 1e-9


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_recorded_order_of_a_sum_is_unrolling_for_small_steps(name) -> None:
    def optimizer(module):
        made = OPTIMIZERS[name](module)
        for group in made.param_groups:
            group["lr"] *= 1e-6
        return made

    run, module, data = train(optimizer, checkpoints=range(10))
    truth = oracles.unrolled(run, module, summed, data, CASE.loss, queries_of(CASE))
    estimator = Source(1, curvature="exact", order="recorded")
    scores = attribute(CASE, run, module, data, estimator, task=TrainingStepTask())
    assert relative(scores.values, truth) < 1e-5


def test_shares_of_a_batch() -> None:
    class Own(AttributionTask):
        def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
            return torch.zeros(len(batch))

    assert Own().share(5) == RegressionTask().share(5) == TrainingStepTask().share(5) == 0.2
    task = TrainingStepTask()
    task.training_batch_size = 20
    task.prepare(CASE.build(), CASE.batch(6))
    assert task.share(5) == task.share(20) == 0.05


def test_retraining_with_a_task_that_has_served_an_attribution() -> None:
    """Prepared, it counts a loss as that of a full batch; the replay takes the step as it was."""
    run, module, data = train(OPTIMIZERS["momentum"], checkpoints=())
    task = TrainingStepTask()
    attribute(CASE, run, module, data, Source(1), task=task)
    assert task.share(2) == 1 / BATCH
    state = retrain(run, module, task, TensorDataset(*data), torch.ones(10))
    assert landing_error(run, state) < 1e-12
