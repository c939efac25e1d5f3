"""Columns that are edits of the training set, against retraining and against altered data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning.edits import Addition, Relabel, Removal, Replace, Term
from tda_lightning.estimators import (
    FastInfluence,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.evaluation import measure, retrain
from tda_lightning.records.errors import UnsupportedTrainingError
from tests.attributing import CaseTask, attribute, relative
from tests.cases.training import CLASSIFIER, MLP, OPTIMIZERS, queries_of, train

# Those whose curvature does not depend on what is edited.
ESTIMATORS = {
    "tracin": TracIn(),
    "influence": InfluenceFunction("identity", damping=0.5),
    "source": Source(2, curvature="identity"),
    "source recorded": Source(2, order="recorded", curvature="identity"),
    "unrolled": Unrolled(),
}
AVERAGED = ("tracin", "influence", "source")


@pytest.fixture(scope="module")
def work() -> Any:
    return train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(3, 6, 9))


def altered(data: tuple[Tensor, Tensor], index: int, example: Any) -> tuple[Tensor, Tensor]:
    """The data with another example at ``index``."""
    tensors = tuple(tensor.clone() for tensor in data)
    for tensor, value in zip(tensors, example, strict=True):
        tensor[index] = value
    return tensors  # type: ignore[return-value]


def other_example(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return data[0][5] * 0.7 + 0.1, 1 - data[1][5]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_removals_are_the_default(name: str, work: Any) -> None:
    run, module, data = work
    expected = attribute(CLASSIFIER, run, module, data, ESTIMATORS[name])
    order = [4, 0, 9, 4]
    scores = attribute(
        CLASSIFIER, run, module, data, ESTIMATORS[name], edits=[Removal(n) for n in order]
    )
    assert relative(scores.values, expected.values[:, order]) < 1e-12
    if expected.by_segment is not None:
        assert relative(scores.by_segment, expected.by_segment[:, :, order]) < 1e-12
    assert scores.self_influence is None


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "unrolled"])
def test_an_edit_is_its_gradient_before_minus_after(name: str, work: Any) -> None:
    """Scores of the altered data at the same checkpoints have the gradient after."""
    run, module, data = work
    index, label = 3, 1 - int(data[1][3])
    example = other_example(data)
    columns = [Relabel(index, label), Replace(index, example), Removal(index)]
    if name in AVERAGED:
        columns.append(Addition(example))
    scores = attribute(CLASSIFIER, run, module, data, ESTIMATORS[name], edits=columns).values

    def removal(changed: tuple[Tensor, Tensor]) -> Tensor:
        return attribute(CLASSIFIER, run, module, changed, ESTIMATORS[name]).values[:, index]

    before = removal(data)
    relabelled = removal(altered(data, index, (data[0][index], label)))
    replaced = removal(altered(data, index, example))
    assert relative(scores[:, 0], before - relabelled) < 1e-10
    assert relative(scores[:, 1], before - replaced) < 1e-10
    assert relative(scores[:, 2], before) < 1e-12
    if name in AVERAGED:
        assert relative(scores[:, 3], -replaced) < 1e-10


class Partly(CaseTask):
    """The loss of one example is partly that of another."""

    index: int = -1
    example: Any = None
    part: float = 0.0

    def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
        inputs, labels, numbers = batch
        old = F.cross_entropy(module(inputs), labels, reduction="none")
        other, label = self.example
        new = F.cross_entropy(module(other[None]), label[None], reduction="none")
        return old + self.part * (numbers == self.index) * (new - old)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_replacement_is_the_derivative_of_retraining(optimizer: str) -> None:
    run, module, data = train(CLASSIFIER, OPTIMIZERS[optimizer], checkpoints=(3, 6, 9))
    index, example = 3, other_example(data)
    scores = attribute(
        CLASSIFIER, run, module, data, Unrolled(), edits=[Removal(1), Replace(index, example)]
    )
    ends = []
    for part in (1e-5, -1e-5):
        task = Partly("classification")
        task.index, task.example, task.part = index, example, part
        numbered = TensorDataset(*data, torch.arange(10))
        state = retrain(run, module, task, numbered, torch.ones(10).double())
        queries = TensorDataset(*queries_of(CLASSIFIER))
        ends.append(measure(module, CaseTask("classification"), state, queries))
    assert relative(scores.values[:, 1], (ends[0] - ends[1]) / 2e-5) < 1e-6


def ridge_optimum(rows: Tensor, targets: Tensor, weights: Tensor, decay: float) -> Tensor:
    """Of the weighted mean of squares (x theta - y)^2, plus decay / 2 |theta|^2."""
    count = (weights > 0.5).sum()
    gram = (
        2 * (rows * weights[:, None]).T @ rows / count + decay * torch.eye(rows.shape[1]).double()
    )
    return torch.linalg.solve(gram, 2 * (rows * weights[:, None]).T @ targets / count)


def test_influence_of_edits_is_the_derivative_of_the_optimum() -> None:
    """A linear model at its optimum: a small share of each edit moves it as predicted."""
    own = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 3, generator=own, dtype=torch.float64)
    targets, decay = torch.randn(10, 1, generator=own, dtype=torch.float64), 0.3
    example = (torch.randn(3, generator=own).double(), torch.randn(1, generator=own).double())
    label = torch.randn(1, generator=own).double()

    def optimum(changes: list[tuple[float, Tensor, Tensor]]) -> Tensor:
        extra = [(torch.tensor([w]).double(), x[None], y[None]) for w, x, y in changes]
        weights = torch.cat([torch.ones(10).double(), *(w for w, _, _ in extra)])
        inputs = torch.cat([rows, *(x for _, x, _ in extra)])
        outputs = torch.cat([targets, *(y for _, _, y in extra)])
        return ridge_optimum(inputs, outputs, weights, decay)

    step = 1e-5
    old = (rows[2], targets[2])
    cases = {
        "removal": (Removal(2), [(-1, *old)]),
        "relabel": (Relabel(2, label.tolist()), [(-1, *old), (1, rows[2], label)]),
        "replace": (Replace(2, example), [(-1, *old), (1, *example)]),
        "addition": (Addition(example), [(1, *example)]),
    }
    queries = torch.randn(4, 3, generator=own).double(), torch.randn(4, 1, generator=own).double()

    def losses(theta: Tensor) -> Tensor:
        return (queries[0] @ theta - queries[1]).square().mean(1)

    expected = []
    for _, changes in cases.values():
        ends = [
            losses(optimum([(sign * step * w, x, y) for w, x, y in changes])) for sign in (1, -1)
        ]
        expected.append((ends[0] - ends[1]) / (2 * step))
    scores = influence_at(
        optimum([]), rows, targets, queries, decay, [e for e, _ in cases.values()]
    )
    assert relative(scores, torch.stack(expected, 1)) < 1e-6


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1, bias=False, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs)


def influence_at(theta, rows, targets, queries, decay, edits) -> Tensor:
    """Influence functions of a run whose last weights are ``theta``."""
    import dataclasses

    from tda_lightning import AttributionModule
    from tda_lightning.records.trajectory import ParameterFact
    from tests.attributing import quiet

    run, _, _ = train(MLP, OPTIMIZERS["sgd"], checkpoints=(9,))
    fact = ParameterFact((1, 3), "float64", 0)
    facts = dataclasses.replace(
        run.facts, parameters={"linear.weight": fact}, fingerprint=None, num_examples=10
    )
    weights = {"linear.weight": theta.T.contiguous()}
    checkpoints = {
        step: dataclasses.replace(
            run.checkpoints[step], parameters=weights, buffers={}, optimizer=None
        )
        for step in run.checkpoints
    }
    run = dataclasses.replace(run, facts=facts, checkpoints=checkpoints, curvature={})

    class Squares(CaseTask):
        def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
            return F.mse_loss(module(batch[0]), batch[1], reduction="none").mean(1)

    attribution = AttributionModule(
        Linear(), run, InfluenceFunction("exact", damping=decay), Squares("regression")
    )
    return attribution.attribute(
        TensorDataset(rows, targets), TensorDataset(*queries), trainer=quiet(), edits=edits
    ).values


@dataclass(frozen=True)
class Duplicate:
    """A kind of edit from outside: an example counts twice."""

    index: int

    def terms(self) -> tuple[Term, ...]:
        return (Term(-1.0, self.index),)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_kind_of_edit_from_outside(name: str, work: Any) -> None:
    run, module, data = work
    removals = attribute(CLASSIFIER, run, module, data, ESTIMATORS[name]).values
    edits = [Duplicate(7), Duplicate(0)]
    scores = attribute(CLASSIFIER, run, module, data, ESTIMATORS[name], edits=edits)
    assert relative(scores.values, -removals[:, [7, 0]]) < 1e-12
    assert scores.provenance["edits"][0] == {"kind": "Duplicate", "index": 7}


class TestBadInput:
    @pytest.mark.parametrize("edit", [Removal(10), Removal(-1), Relabel(10, 0)])
    def test_an_index_outside_the_data(self, edit: Any, work: Any) -> None:
        with pytest.raises(ValueError, match=r"Edit 0, \w+, names training example -?\d+; expec"):
            attribute(CLASSIFIER, *work, TracIn(), edits=[edit])

    @pytest.mark.parametrize("index", [[0, 1], torch.tensor(3), 2.0])
    def test_an_index_that_is_no_whole_number(self, index: Any, work: Any) -> None:
        with pytest.raises(TypeError, match="Edit 0, Removal, must name .* whole number, got"):
            attribute(CLASSIFIER, *work, TracIn(), edits=[Removal(index)])

    @pytest.mark.parametrize("kind", [Addition, lambda example: Replace(0, example)])
    def test_an_input_of_another_shape(self, kind: Any, work: Any) -> None:
        edit = kind((torch.zeros(99, dtype=torch.float64), torch.tensor(0)))
        with pytest.raises(ValueError, match=r"another form.*expected \(float64 \[3\].*\[99\]"):
            attribute(CLASSIFIER, *work, TracIn(), edits=[edit])

    def test_no_edits(self, work: Any) -> None:
        with pytest.raises(ValueError, match="edits is empty"):
            attribute(CLASSIFIER, *work, TracIn(), edits=[])

    @pytest.mark.parametrize("name", ["unrolled", "source recorded"])
    def test_additions_are_in_no_recorded_batch(self, name: str, work: Any) -> None:
        edits = [Addition(other_example(work[2]))]
        with pytest.raises(UnsupportedTrainingError, match="changes no example of the recorded"):
            attribute(CLASSIFIER, *work, ESTIMATORS[name], edits=edits)

    def test_fast_influence(self, work: Any) -> None:
        with pytest.raises(ValueError, match="expected no edits"):
            attribute(CLASSIFIER, *work, FastInfluence(k=2), edits=[Removal(0)])
