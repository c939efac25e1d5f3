"""Attributing the small runs of ``tests.cases.training``, quietly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.estimators import Estimator
from tda_lightning.session.pace import Pace
from tda_lightning.tasks import AttributionTask
from tda_lightning.tasks.gauss_newton import sampled_gauss_newton_loss
from tests import oracles
from tests.cases import Case
from tests.cases.training import queries_of


def quiet(**options: Any) -> Trainer:
    """A trainer for the passes of an attribution."""
    return Trainer(
        devices=options.pop("devices", 1),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@dataclasses.dataclass
class CaseTask(AttributionTask):
    """The loss of a case, through torch's standard losses: logits in the last axis."""

    kind: str
    factor: float = 1.0  # of the measurement
    margin: bool = False  # measure by the first output instead of the loss

    def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        outputs = module(inputs)
        if self.kind == "classification":
            losses = F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")
        else:
            losses = F.mse_loss(outputs, targets, reduction="none")
        return losses.reshape(len(losses), -1).mean(1)

    def sampled_loss(self, module: nn.Module, batch: Any) -> Tensor:
        return sampled_gauss_newton_loss(self, module, batch)

    @property
    def measures_loss(self) -> bool:
        return self.factor == 1 and not self.margin

    def measurement(self, module: nn.Module, batch: Any) -> Tensor:
        if self.margin:
            return module(batch[0]).reshape(len(batch[0]), -1)[:, 0]
        return self.factor * self.train_loss(module, batch)


def attribute(
    case: Case,
    run: Trajectory,
    module: nn.Module,
    data: tuple[Tensor, Tensor],
    estimator: Estimator,
    *,
    queries: tuple[Tensor, Tensor] | None = None,
    task: AttributionTask | None = None,
    batch_size: int = 6,
    **options: Any,
) -> Scores:
    """Scores of a run of ``tests.cases.training.train`` for :func:`queries_of` the case, with
    self-influence."""
    options.setdefault("self_influence", True)
    queries = queries_of(case) if queries is None else queries
    attribution = AttributionModule(module, run, estimator, task or CaseTask(case.kind))
    return attribution.attribute(
        TensorDataset(*data),
        TensorDataset(*queries),
        batch_size=batch_size,
        trainer=quiet(),
        **options,
    )


def in_float32(
    run: Trajectory, module: nn.Module, *data: tuple[Tensor, Tensor]
) -> tuple[Trajectory, nn.Module, list[tuple[Tensor, ...]]]:
    """The same problem in single precision."""
    rounded = [tuple(t.float() if t.is_floating_point() else t for t in pair) for pair in data]
    return oracles.cast(run, torch.float32), module.float(), rounded


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def slope(found: Tensor, expected: Tensor) -> float:
    return float((found * expected).sum() / expected.square().sum())


@contextmanager
def watched_walks() -> Iterator[list[str]]:
    """The titles of the walks over the training set that are made meanwhile."""
    titles: list[str] = []
    walk = Pace.walk

    def watched(self: Pace, title: str, *rest: Any) -> Any:
        titles.append(title)
        return walk(self, title, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "walk", watched)
        yield titles
