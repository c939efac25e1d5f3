"""Training steps composed at random: scores and retraining against plain autograd."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import seed as seed_of
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import TracIn, Unrolled
from tda_lightning.evaluation import landing_error, retrain
from tda_lightning.records.errors import UnsupportedTrainingError
from tests import oracles
from tests.attributing import quiet, relative
from tests.composed import (
    FACTORS,
    LIBRARY,
    NETWORKS,
    PENALTIES,
    REDUCTIONS,
    STRUCTURES,
    TERMS,
    Composed,
    Composition,
    dataset,
)

TRAIN, QUERIES, BATCH, RATE = 9, 2, 4, 0.1

_loss = st.one_of(
    st.tuples(
        st.sampled_from(sorted(TERMS)), st.sampled_from(sorted(REDUCTIONS)),
        st.sampled_from(sorted(FACTORS)),
    ),
    st.tuples(st.sampled_from(sorted(LIBRARY)), st.just(""), st.sampled_from(sorted(FACTORS))),
)  # fmt: skip
COMPOSITIONS = st.builds(
    Composition,
    network=st.sampled_from(sorted(NETWORKS)),
    losses=st.lists(_loss, min_size=1, max_size=2).map(tuple),
    penalty=st.sampled_from(sorted(PENALTIES)),
    structure=st.sampled_from(sorted(STRUCTURES)),
)


class Rows(Dataset[tuple[Tensor, ...]]):
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)


def loader(composition: Composition, tensors: Sequence[Tensor]) -> DataLoader[Any]:
    def collate(items: Sequence[tuple[Tensor, ...]]) -> Any:
        batch = tuple(torch.stack(column) for column in zip(*items, strict=True))
        return STRUCTURES[composition.structure](batch)

    return DataLoader(Rows(tensors), batch_size=5, collate_fn=collate)


def single(data: Sequence[Tensor], index: int) -> tuple[Tensor, ...]:
    return tuple(tensor[index : index + 1] for tensor in data)


class Oracle:
    """The same training, example by example, with weights."""

    def __init__(self, module: Composed, run: Trajectory, data: Sequence[Tensor]) -> None:
        self.module, self.run, self.data = module, run, data
        self.names = list(run.facts.parameters)

    def called(self, parameters: dict[str, Tensor], method: str, *args: Any) -> Any:
        """A method of the module with other parameters."""
        shell = _Shell(self.module, method)
        named = {f"module.{name}": value for name, value in parameters.items()}
        return functional_call(shell, named, args)

    def batch_loss(self, parameters: dict[str, Tensor], batch: Tensor, weights: Tensor) -> Tensor:
        own = [self.called(parameters, "own", single(self.data, n)) for n in batch.tolist()]
        total = self.called(parameters, "penalty")
        for k in range(len(self.module.composition.losses)):
            factor = own[0][k][0]
            above = sum(
                w * parts[k][1].numerator for w, parts in zip(weights[batch], own, strict=True)
            )
            mass = [parts[k][1].mass for parts in own]
            below = 1.0 if mass[0] is None else sum(mass)
            total = total + factor * above / below
        return total

    def masses(self) -> list[tuple[float, float]]:
        """Average mass per example and per term of each loss, over the training set."""
        own = [self.module.own(single(self.data, n)) for n in range(TRAIN)]
        averages = []
        for k in range(len(own[0])):
            if own[0][k][1].mass is None:
                averages.append((1.0 / BATCH, 1.0))
                continue
            total = sum(float(parts[k][1].mass) for parts in own)
            terms = sum(float(parts[k][1].terms) for parts in own)
            averages.append((total / TRAIN, total / terms))
        return averages

    def train_loss(self, example: tuple[Tensor, ...]) -> Tensor:
        parts = zip(self.module.own(example), self.masses(), strict=True)
        return sum(factor * own.numerator / mass for (factor, own), (mass, _) in parts)

    def measurement(self, example: tuple[Tensor, ...]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for (factor, own), (_, term) in zip(self.module.own(example), self.masses(), strict=True):
            below = 1.0 if own.mass is None else own.terms * term
            total = total + factor * own.numerator / below
        return total

    def gradient(self, value: Tensor) -> Tensor:
        parameters = [self.module.get_parameter(name) for name in self.names]
        rows = torch.autograd.grad(value, parameters, materialize_grads=True)
        return torch.cat([row.flatten() for row in rows])

    def trained(self, weights: Tensor) -> dict[str, Tensor]:
        """The end of the run with weights, differentiable by them."""
        parameters = {
            name: self.run.checkpoints[0].parameters[name].clone().requires_grad_()
            for name in self.names
        }
        for row in range(self.run.last_step):
            (batch,) = self.run.steps.batches(row)
            loss = self.batch_loss(parameters, batch, weights)
            values = list(parameters.values())
            gradients = torch.autograd.grad(loss, values, create_graph=True, materialize_grads=True)
            parameters = {
                name: value - RATE * gradient
                for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
            }
        return parameters


class _Shell(torch.nn.Module):
    def __init__(self, module: Composed, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any) -> Any:
        if self.method == "penalty":
            return torch.as_tensor(PENALTIES[self.module.composition.penalty](self.module))
        return getattr(self.module, self.method)(*args)


def check(composition: Composition) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # the oracle differentiates attention twice
        try:
            _check(composition)
        except UnsupportedTrainingError as error:
            # Alone, an example does not tell a mean over the batch from a sum.
            assert composition.network == "sorting" and len(composition.losses) > 1
            assert "averages one loss over the batch and sums another" in str(error)


def _check(composition: Composition) -> None:
    torch.manual_seed(0)
    module = Composed(composition)
    everything = dataset(TRAIN + QUERIES)
    data = tuple(tensor[:TRAIN] for tensor in everything)
    queries = tuple(tensor[TRAIN:] for tensor in everything)
    run = oracles.record_run(
        module,
        lambda m, batch: m.training_step(STRUCTURES[composition.structure](batch), 0),
        data,
        lambda m: torch.optim.SGD(m.parameters(), RATE),
        oracles.cut_batches(TRAIN, BATCH, epochs=1),
        checkpoints=(),
    )
    last = run.last_step
    train, asked = loader(composition, data), loader(composition, queries)

    def scores(estimator: TracIn | Unrolled) -> Tensor:
        attribution = AttributionModule(module, run, estimator)
        options: dict[str, Any] = {"trainer": quiet(), "self_influence": False}
        return attribution.attribute(train, asked, **options).values

    module.load_state_dict(run.checkpoints[last].parameters)
    oracle = Oracle(module, run, data)
    measured = torch.stack(
        [oracle.gradient(oracle.measurement(single(queries, q))) for q in range(QUERIES)]
    )
    losses = torch.stack(
        [oracle.gradient(oracle.train_loss(single(data, n))) for n in range(TRAIN)]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(one example at a|example by example|batching).*"
        )
        assert relative(scores(TracIn()), RATE * last / TRAIN * measured @ losses.T) < 1e-8
        weights = torch.ones(TRAIN, dtype=torch.float64, requires_grad=True)
        end = oracle.trained(weights)
        ends = torch.cat([end[name].flatten() for name in oracle.names])
        truth = torch.stack(
            [torch.autograd.grad(ends, weights, -row, retain_graph=True)[0] for row in measured]
        )
        assert relative(scores(Unrolled()), truth) < 1e-8
        assert landing_error(run, retrain(run, module, None, train, torch.ones(TRAIN))) < 1e-12
        other = torch.rand(TRAIN, dtype=torch.float64)
        replayed = retrain(run, module, None, train, other)
        for name, value in oracle.trained(other).items():
            torch.testing.assert_close(replayed[name], value.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_composed_steps_are_attributed_as_plain_autograd_has_them(seed: int) -> None:
    """Ten compositions; thirty more, and two thousand, by hand."""

    @seed_of(seed)
    @settings(max_examples=10, deadline=None, database=None, phases=[Phase.generate])
    @given(COMPOSITIONS)
    def each(composition: Composition) -> None:
        check(composition)

    each()


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, database=None, phases=[Phase.generate])
@given(COMPOSITIONS)
def test_many_composed_steps(composition: Composition) -> None:
    check(composition)
