"""What scores may not depend on: batches, order, processes, the loss's reduction; and what kept
curvature may depend on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Scores
from tda_lightning.estimators import TRAK, InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.session import session as session_module
from tda_lightning.session.session import Session
from tests import oracles
from tests.attributing import CaseTask, attribute, quiet, relative
from tests.cases.training import CLASSIFIER, MLP, OPTIMIZERS, queries_of, train
from tests.processes import results

ESTIMATORS = {
    "tracin": TracIn(),
    "influence": InfluenceFunction(),
    "source": Source(2),
    "source exact": Source(2, curvature="exact"),
    "source recorded": Source(2, order="recorded"),
    "source recorded exact": Source(2, order="recorded", curvature="exact"),
    "trak": TRAK(projection_dimension=4),
    "unrolled": Unrolled(),
}


def require_same(found, expected) -> None:
    torch.testing.assert_close(found.values, expected.values, rtol=1e-8, atol=1e-12)
    if expected.by_segment is not None:
        torch.testing.assert_close(found.by_segment, expected.by_segment, rtol=1e-8, atol=1e-12)
    if expected.self_influence is not None:
        torch.testing.assert_close(
            found.self_influence, expected.self_influence, rtol=1e-8, atol=1e-12
        )


def fresh(run):
    """The run without the curvature that earlier attributions kept."""
    return dataclasses.replace(run, curvature={})


def test_walks_of_wide_layers_take_fewer_examples_at_a_time(monkeypatch) -> None:
    run, module, data = train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(3, 6))
    found, walked = [], []
    own = Session.train_gradients

    def watched(session, batch, examples, noise=None):
        walked.append(len(examples))
        return own(session, batch, examples, noise)

    monkeypatch.setattr(Session, "train_gradients", watched)
    for scalars in (1 << 22, 1):
        walked.clear()
        monkeypatch.setattr(session_module, "_OUTPUT_SCALARS", scalars)
        monkeypatch.setattr(session_module, "_FEWEST", 2)
        found.append(
            attribute(CLASSIFIER, fresh(run), module, data, ESTIMATORS["influence"], batch_size=5)
        )
        assert max(walked) == (5 if scalars > 1 else 2)
    require_same(found[1], found[0])


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_batches_and_their_order(name, optimizer) -> None:
    """Batch sizes, and shuffling loaders of batch sizes of their own."""
    run, module, data = train(CLASSIFIER, OPTIMIZERS[optimizer], checkpoints=(3, 6))
    expected = attribute(CLASSIFIER, run, module, data, ESTIMATORS[name])
    for size in (1, 256):
        found = attribute(CLASSIFIER, fresh(run), module, data, ESTIMATORS[name], batch_size=size)
        require_same(found, expected)
    train_set, query_set = TensorDataset(*data), TensorDataset(*queries_of(CLASSIFIER))
    attribution = AttributionModule(
        module, fresh(run), ESTIMATORS[name], CaseTask("classification")
    )
    shuffled = attribution.attribute(
        DataLoader(train_set, 3, shuffle=True, drop_last=True),
        DataLoader(query_set, 2, shuffle=True),
        trainer=quiet(),
        self_influence=True,
    )
    require_same(shuffled, expected)


@pytest.mark.parametrize("name", ["tracin", "source exact", "source recorded exact", "unrolled"])
def test_order_of_the_training_set(name) -> None:
    """The same run on a reordered data set: the columns are reordered, nothing else."""
    run, module, data = train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(3, 6))
    expected = attribute(CLASSIFIER, run, module, data, ESTIMATORS[name])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    place = order.argsort()  # where an example of the old data set is in the new one
    steps = dataclasses.replace(run.steps, examples=place[run.steps.examples])
    moved = dataclasses.replace(fresh(run), steps=steps)
    found = attribute(CLASSIFIER, moved, module, oracles.take(data, order), ESTIMATORS[name])
    torch.testing.assert_close(found.values, expected.values[:, order], rtol=1e-8, atol=1e-12)
    if expected.self_influence is not None:
        torch.testing.assert_close(found.self_influence, expected.self_influence[order])


class Reduced(LightningModule):
    """A training step that averages or sums over its batch."""

    def __init__(self, net: nn.Module, kind: str, reduction: str) -> None:
        super().__init__()
        self.net, self.kind, self.reduction = net, kind, reduction

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        outputs = self(batch[0])
        if self.kind == "classification":
            return F.cross_entropy(outputs, batch[1], reduction=self.reduction)
        losses = F.mse_loss(outputs, batch[1], reduction="none").mean(1)
        return losses.sum() if self.reduction == "sum" else losses.mean()


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("case", [MLP, CLASSIFIER], ids=lambda case: case.kind)
def test_mean_and_sum_of_the_batch_are_one_training(case, name) -> None:
    """The step sums over its batch of 5 and the rate is a fifth: the same weights, the same scores
    without a task, and those of the task that says so."""
    data, queries = case.batch(10), queries_of(case)
    batches = oracles.cut_batches(10, 5, epochs=4)
    found = {}
    for reduction, factor in (("mean", 1), ("sum", 5)):
        module = Reduced(case.build(), case.kind, reduction)
        run = oracles.record_run(
            module,
            lambda m, b, f=factor: f * case.loss(m, b),
            data,
            lambda m, f=factor: torch.optim.SGD(m.parameters(), 0.05 / f, 0.8),
            batches,
            checkpoints=(4,),
        )
        # The applied curvature, damping included, has the unit of the loss.
        attribution = AttributionModule(module, run, ESTIMATORS[name])
        found[reduction] = attribution.attribute(
            TensorDataset(*data),
            TensorDataset(*queries),
            batch_size=3,
            trainer=quiet(),
            self_influence=True,
        )
    require_same(found["sum"], found["mean"])
    module = Reduced(case.build(), case.kind, "mean")
    run = oracles.record_run(
        module,
        case.loss,
        data,
        lambda m: torch.optim.SGD(m.parameters(), 0.05, 0.8),
        batches,
        checkpoints=(4,),
    )
    told = attribute(case, run, module, data, ESTIMATORS[name])
    assert relative(told.values, found["mean"].values) < 1e-9


# In double precision, which tests/attribution/test_processes_scoring.py has every estimator in
# single precision for. In batches of 10 the recorded order leaves a process without any.
EACH = ("source exact", "source recorded exact", "unrolled")
SHARDED = [*((name, 4) for name in EACH), ("source", 10), ("source recorded", 10)]


def score_sharded(rank: int, out: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    run, module, data = train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(3, 6))
    found = {}
    for name, size in SHARDED:
        run.curvature.clear()
        attribution = AttributionModule(module, run, ESTIMATORS[name], CaseTask("classification"))
        scores = attribution.attribute(
            TensorDataset(*data),
            TensorDataset(*queries_of(CLASSIFIER)),
            batch_size=size,
            trainer=quiet(devices=2, strategy="ddp"),
            self_influence=True,
            scores_path=str(out / f"{name}.{size}.h5"),
        )
        found[name, size] = (scores.values, scores.by_segment, scores.self_influence)
    return found


def test_two_processes(tmp_path: Path) -> None:
    """Sharded passes, on every process the scores of one; also a process without any batch."""
    both = results(score_sharded, tmp_path)
    run, module, data = train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(3, 6))
    expected = {
        name: attribute(CLASSIFIER, run, module, data, estimator)
        for name, estimator in ESTIMATORS.items()
        if any(name == sharded for sharded, _ in SHARDED)
    }
    for found in both:
        for name, size in SHARDED:
            values, by_segment, own = found[name, size]
            torch.testing.assert_close(values, expected[name].values, rtol=1e-8, atol=1e-12)
            if by_segment is not None:
                torch.testing.assert_close(by_segment, expected[name].by_segment)
            if own is not None:
                torch.testing.assert_close(own, expected[name].self_influence)
            saved = Scores.load(tmp_path / f"{name}.{size}.h5")
            assert torch.equal(saved.values, values)
            assert saved.provenance["world_size"] == 2


@pytest.fixture
def curvature_passes(monkeypatch) -> list[int]:
    """Steps whose gradients curvature has asked for, one entry for each batch."""
    asked: list[int] = []
    original = Session.fisher_gradients

    def counted(self, batch, examples, seed):
        asked.append(self.loaded_step)
        return original(self, batch, examples, seed)

    monkeypatch.setattr(Session, "fisher_gradients", counted)
    return asked


def test_kept_curvature_is_used_when_all_that_determines_it_is_equal(curvature_passes) -> None:
    run, module, data = train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(3, 6))
    blocks = Source(2, leading_directions=0)
    first = attribute(CLASSIFIER, run, module, data, blocks)
    assert set(curvature_passes) == {3, 6, 9}
    # Again; in other batches; for other queries; on the recorded order; cut by steps.
    curvature_passes.clear()
    require_same(attribute(CLASSIFIER, run, module, data, blocks), first)
    attribute(CLASSIFIER, run, module, data, blocks, batch_size=3)
    attribute(CLASSIFIER, run, module, data, blocks, queries=CLASSIFIER.batch(2, seed=9))
    attribute(CLASSIFIER, run, module, data, Source(2, order="recorded", leading_directions=0))
    attribute(CLASSIFIER, run, module, data, Source(segment_steps=[4], leading_directions=0))
    assert curvature_passes == []
    assert len(run.curvature) == 2


CHANGES = {
    "kind": lambda r, m, d, t: (r, m, d, t, Source(2, curvature="diagonal")),
    "seed": lambda r, m, d, t: (r, m, d, t, Source(2, seed=1)),
    "segments": lambda r, m, d, t: (r, m, d, t, Source(1)),
    "task": lambda r, m, d, t: (r, m, d, CaseTask("classification", factor=2.0), Source(2)),
    "layers": lambda r, m, d, t: (r, m, d, _restricted(t), Source(2)),
    "data": lambda r, m, d, t: (r, m, (d[0] + 0.01, d[1]), t, Source(2)),
    "weights": lambda r, m, d, t: (_nudged(r), m, d, t, Source(2)),
    "precision": lambda r, m, d, t: (
        dataclasses.replace(oracles.cast(r, torch.float32), curvature=r.curvature),
        m.float(),
        (d[0].float(), d[1]),
        t,
        Source(2),
    ),
}


def _restricted(task):
    task.layers = ["0"]
    return task


def _nudged(run):
    checkpoint = run.checkpoints[9]
    parameters = {name: value + 1e-12 for name, value in checkpoint.parameters.items()}
    checkpoints = {**run.checkpoints, 9: dataclasses.replace(checkpoint, parameters=parameters)}
    return dataclasses.replace(run, checkpoints=checkpoints)


@pytest.mark.parametrize("change", CHANGES)
def test_curvature_is_fitted_again_when_something_has_changed(change, curvature_passes) -> None:
    run, module, data = train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(3, 6))
    attribute(CLASSIFIER, run, module, data, Source(2))
    curvature_passes.clear()
    run, module, data, task, estimator = CHANGES[change](
        run, module, data, CaseTask("classification")
    )
    inputs, labels = queries_of(CLASSIFIER)
    queries = (inputs.to(data[0].dtype), labels)
    found = attribute(CLASSIFIER, run, module, data, estimator, queries=queries, task=task)
    assert 9 in curvature_passes
    again = attribute(CLASSIFIER, fresh(run), module, data, estimator, queries=queries, task=task)
    torch.testing.assert_close(found.values, again.values)
