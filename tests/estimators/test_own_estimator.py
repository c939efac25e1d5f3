"""An estimator, an edit and an optimizer of a user's own, through public names alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Ensemble, TrajectoryRecorder
from tda_lightning.edits import Term
from tda_lightning.optimizers import OptimizerRule, ParameterStep, register
from tda_lightning.session import Session


@dataclass
class GradientDot:
    """Gradients compared at the last checkpoint, with no rate: a factor of one's own instead."""

    factor: float = 1.0

    def segment_count(self, session: Session) -> int | None:
        return None

    def score(self, session: Session) -> dict[str, Any]:
        step = session.trajectory.last_step
        for first, last in session.query_rounds(session.gradient_bytes(copies=1)):
            session.load(step)
            queries = session.query_gradients(first, last)
            for batch in session.walk_columns("gradient dot product", step):
                values = self.factor * queries.dot(batch.gradients) / session.num_train
                session.add(None, batch, values, first)
        return {"checkpoints": [step], "notes": ["The estimator is the user's own."]}


@dataclass(frozen=True)
class Doubled:
    """An example counts twice."""

    index: int

    def terms(self) -> tuple[Term, ...]:
        return (Term(-1.0, self.index),)


class Halving(torch.optim.Optimizer):
    """Gradient descent at half the rate that it is given."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"] / 2)
        return loss


def halving_adjoint(a: Any, states: Any, step: ParameterStep) -> Any:
    return -step.rate / 2 * a


register(OptimizerRule(optimizer=Halving, settings=(), states=(), adjoint=halving_adjoint))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2, dtype=torch.float64)

    def training_step(self, batch: Any, batch_index: int) -> Any:
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return Halving(self.parameters(), lr=0.3)


@pytest.fixture(scope="module")
def work(tmp_path_factory: Any) -> Any:
    own = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 3, generator=own, dtype=torch.float64)
    data = TensorDataset(inputs, torch.arange(12) % 2)
    folder: Path = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        torch.manual_seed(seed)
        module = Model()
        Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[TrajectoryRecorder(folder / str(seed), num_checkpoints=2)],
        ).fit(module, DataLoader(data, 4, shuffle=True))
    return module, folder, data


def loop(module: Model, data: TensorDataset, queries: TensorDataset) -> torch.Tensor:
    """Inner products of gradients over N, one example at a time."""

    def rows(examples: TensorDataset) -> torch.Tensor:
        gradients = []
        for inputs, label in examples:
            loss = F.cross_entropy(module.layer(inputs[None]), label[None])
            parts = torch.autograd.grad(loss, list(module.parameters()))
            gradients.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(gradients)

    return rows(queries) @ rows(data).T / len(data)


def test_a_toy_estimator(work: Any, tmp_path: Path) -> None:
    module, folder, data = work
    queries = TensorDataset(*(tensor[:3] for tensor in data.tensors))
    attribution = AttributionModule(module, str(folder / "1"), GradientDot(2.0))
    scores = attribution.attribute(data, queries, 5, scores_path=str(tmp_path / "scores.h5"))
    torch.testing.assert_close(scores.values, 2 * loop(module, data, queries))
    assert scores.provenance["settings"] == {"factor": 2.0}
    assert "The estimator is the user's own." in scores.provenance["notes"]
    plan = attribution.plan(data, queries, 5)
    assert [(group.title, group.count, group.batches) for group in plan.passes] == [
        ("gradient dot product", 1, 3)
    ]


def test_with_a_toy_edit_an_ensemble_and_a_toy_optimizer(work: Any) -> None:
    module, folder, data = work
    queries = TensorDataset(*(tensor[:3] for tensor in data.tensors))
    members = [str(folder / str(seed)) for seed in range(2)]
    together = AttributionModule(module, Ensemble(members), GradientDot())
    scores = together.attribute(data, queries, edits=[Doubled(4), Doubled(0)])
    torch.testing.assert_close(scores.member(1).values, -loop(module, data, queries)[:, [4, 0]])
    assert scores.spread.shape == (3, 2) and bool((scores.spread > 0).all())
