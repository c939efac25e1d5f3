"""SOURCE of optimizers that divide by squared gradients: it stays bounded where the run did, and
what training could not move is not moved by it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.estimators import Source
from tda_lightning.estimators.source import segments, stepwise
from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.store import open_trajectory
from tests import oracles
from tests.attributing import CaseTask, attribute, quiet, relative
from tests.cases import Case
from tests.cases.case import normal
from tests.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore")

TASK = CaseTask("classification")


def correlation(found: Tensor, expected: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1])


# High rates: units die and wake, inputs are rarely lit.


def sparse_run(seed: int, rate: float) -> tuple[Trajectory, nn.Module, Any, Any]:
    """80 examples of 12 features that are lit in 2% to 60% of them, ten epochs of AdamW."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(85, 12, generator=generator, dtype=torch.float64)
    lit = torch.rand(85, 12, generator=generator) < torch.linspace(0.02, 0.6, 12)
    x = x.abs() * lit
    y = (x @ torch.randn(12, 3, generator=generator, dtype=torch.float64)).argmax(1)
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    run = oracles.record_run(
        module,
        lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none"),
        (x[:80], y[:80]),
        lambda m: torch.optim.AdamW(m.parameters(), rate),
        oracles.cut_batches(80, 8, epochs=10, seed=seed),
        range(20, 101, 20),
    )
    return run, module, (x[:80], y[:80]), (x[80:], y[80:])


def scores_of(work: Any, estimator: Source) -> Scores:
    run, module, data, queries = work
    case = Case("sparse", lambda: module, normal(12), kind="classification")
    return attribute(case, run, module, data, estimator, queries=queries, batch_size=80)


def unrolled(work: Any) -> Tensor:
    run, module, data, queries = work
    loss = lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none")  # noqa: E731
    return oracles.unrolled(run, module, loss, data, loss, queries)


@pytest.mark.parametrize(
    ("seed", "rate", "least"),
    [(3, 0.01, 0.8), pytest.param(2, 0.03, 0.95, marks=pytest.mark.slow)],
)
def test_the_recorded_order_stays_with_a_run_at_a_high_rate(seed, rate, least) -> None:
    """With one metric for a segment's curvature and gradients, correlations of .005 and .38."""
    work = sparse_run(seed, rate)
    truth = unrolled(work)
    average, recorded = (
        scores_of(work, Source(curvature="exact", order=order)).values
        for order in ("average", "recorded")
    )
    assert correlation(recorded, truth) > max(least, correlation(average, truth))
    assert recorded.abs().max() < 1.5 * truth.abs().max()


def test_the_rebuilt_second_moments_land_on_the_recorded_ones(monkeypatch) -> None:
    rebuilt = []
    original = stepwise._rebuilt_steps

    def kept(segment: Any, *rest: Any) -> Any:
        steps = original(segment, *rest)
        rebuilt.append((steps, stepwise._recorded_states(segment, steps.stop)))
        return steps

    monkeypatch.setattr(stepwise, "_rebuilt_steps", kept)
    work = sparse_run(2, 0.01)
    # A cut within an interval: each part of it lands at the end of the whole.
    scores_of(work, Source(segment_steps=[30], curvature="diagonal", order="recorded"))
    assert len(rebuilt) == 6
    for steps, recorded in rebuilt:
        for name, states in steps.states.items():
            found, expected = states["exp_avg_sq"][-1], recorded[name]["exp_avg_sq"]
            seen = steps.gradients[name].abs().sum(0) > 0
            torch.testing.assert_close(found[seen], expected[seen])


@pytest.mark.parametrize("factor", [30.0, 100.0])
def test_curvature_beyond_what_is_stable_is_bounded_and_said(factor, monkeypatch) -> None:
    """Curvature that is too large by the square of a factor."""
    work = sparse_run(2, 0.01)
    estimator = Source(curvature="exact", order="recorded")
    plain = scores_of(work, estimator)
    assert "what is stable" not in str(plain.provenance["notes"])
    scales = lifted(segments.unit_scales, factor)
    monkeypatch.setattr("tda_lightning.estimators.source.estimator.unit_scales", scales)
    scores = scores_of(work, estimator)
    assert "of 100 steps the curvature that was fitted" in str(scores.provenance["notes"])
    assert scores.values.abs().max() < 10 * plain.values.abs().max()


def lifted(scales: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """As if h had been so much larger when curvature was fitted."""
    return lambda *given: {name: factor * own for name, own in scales(*given).items()}


# What training cannot move.


class Net(LightningModule):
    """``still``: the parameters that training cannot move, trained all the same or frozen."""

    def __init__(self, build: Callable[[], nn.Module], make: Any, frozen: tuple[str, ...]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net, self.make = build().double(), make
        for name in frozen:
            self.net.get_parameter(name).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make([p for p in self.parameters() if p.requires_grad])


def classes(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] * x[:, 1] > 0).long()


DATA, QUERIES = classes(24, 1), classes(3, 2)


def scored(
    path: Path, build: Any, make: Any, frozen: tuple[str, ...], estimators: Any
) -> list[Scores]:
    """Scores of a run of two epochs of batches of 6."""
    module = Net(build, make, frozen)
    loader = DataLoader(
        TensorDataset(*DATA), 6, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    recorder = TrajectoryRecorder(path, num_checkpoints=2)
    trainer(recorder, max_epochs=2).fit(module, loader)
    run = open_trajectory(path)
    return [
        AttributionModule(copy.deepcopy(module), run, estimator, TASK).attribute(
            TensorDataset(*DATA), TensorDataset(*QUERIES), batch_size=8, trainer=quiet()
        )
        for estimator in estimators
    ]


class Added(nn.Module):
    """Adds a parameter."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(shape))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.shift


class Attention(nn.Module):
    """Over the features as positions. Softmax takes the bias of keys away."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(1, 3) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs[..., None]
        weights = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return (weights @ self.value(x)).mean(1)


class Rows(nn.Module):
    """Rows of a table by the sign of the first feature; the other rows are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.randn(2, 6))
        self.unused = nn.Parameter(torch.randn(3, 6))

    def forward(self, inputs: Tensor) -> Tensor:
        table = torch.cat([self.used, self.unused])
        return inputs + table[(inputs[:, 0] > 0).long()]


class Masked(nn.Module):
    """A linear layer of which one half is masked away."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.masked = (nn.Parameter(torch.randn(4, 3)) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ torch.cat([self.live, 0 * self.masked], 1).T


class Dead(nn.Module):
    """Units that are never on beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.dead = nn.Linear(6, 3), nn.Linear(6, 3)
        nn.init.constant_(self.dead.bias, -100.0)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.alive(inputs).relu(), self.dead(inputs).relu()], 1)


def sequential(*parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(part() for part in parts))


def linear(*sizes: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*sizes)


# A model, and the parameters in it that training cannot move.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "bias before BatchNorm": (
        sequential(linear(6, 4), lambda: nn.BatchNorm1d(4), nn.ReLU, linear(4, 2)),
        ("0.bias",),
    ),
    "two layers of it": (
        sequential(
            linear(6, 4),
            lambda: nn.BatchNorm1d(4),
            nn.Tanh,
            linear(4, 3),
            lambda: nn.BatchNorm1d(3),
            linear(3, 2),
        ),
        ("0.bias", "3.bias"),
    ),
    "bias of a convolution": (
        sequential(
            lambda: nn.Unflatten(1, (1, 6)),
            lambda: nn.Conv1d(1, 2, 3),
            lambda: nn.BatchNorm1d(2),
            nn.ReLU,
            nn.Flatten,
            linear(8, 2),
        ),
        ("1.bias",),
    ),
    "a shift of its own, not affine": (
        sequential(
            linear(6, 4, False),
            lambda: Added(4),
            lambda: nn.BatchNorm1d(4, affine=False),
            nn.ReLU,
            linear(4, 2),
        ),
        ("1.shift",),
    ),
    "cumulative statistics": (
        sequential(linear(6, 4), lambda: nn.BatchNorm1d(4, momentum=None), nn.ReLU, linear(4, 2)),
        ("0.bias",),
    ),
    "InstanceNorm with running statistics": (
        sequential(
            lambda: nn.Unflatten(1, (1, 6)),
            lambda: nn.Conv1d(1, 2, 3),
            lambda: nn.InstanceNorm1d(2, track_running_stats=True),
            nn.ReLU,
            nn.Flatten,
            linear(8, 2),
        ),
        ("1.bias",),
    ),
    "a shift before LayerNorm": (
        sequential(linear(6, 4), lambda: Added(1), lambda: nn.LayerNorm(4), nn.ReLU, linear(4, 2)),
        ("1.shift",),
    ),
    "a shift before GroupNorm": (
        sequential(
            linear(6, 4), lambda: Added(1), lambda: nn.GroupNorm(2, 4), nn.ReLU, linear(4, 2)
        ),
        ("1.shift",),
    ),
    "a shift of all logits": (
        sequential(linear(6, 4), nn.ReLU, linear(4, 2), lambda: Added(1)),
        ("3.shift",),
    ),
    "key bias": (sequential(Attention, linear(3, 2)), ("0.key.bias",)),
    "dead units": (sequential(Dead, linear(6, 2)), ("0.dead.weight", "0.dead.bias")),
    "unused rows": (sequential(Rows, linear(6, 4), nn.ReLU, linear(4, 2)), ("0.unused",)),
    "masked weights": (sequential(linear(6, 6), nn.ReLU, Masked, linear(4, 2)), ("2.masked",)),
}
NORMALISED = ("bias before BatchNorm", "bias of a convolution")


def adam(kind: Any = torch.optim.AdamW, **options: Any) -> Any:
    return lambda parameters: kind(parameters, **{"lr": 0.01, **options})


QUICK = (*NORMALISED, "a shift before GroupNorm", "key bias", "unused rows")


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_what_training_cannot_move_counts_as_frozen(kind: str, tmp_path: Path) -> None:
    """The oracle is the same model with these parameters frozen: the same run, and the same
    scores."""
    build, still = KINDS[kind]
    orders = ("average", "recorded") if kind in NORMALISED else ("recorded",)
    estimators = [Source(1, curvature="exact", order=order) for order in orders]
    trained = scored(tmp_path / "trained", build, adam(weight_decay=0.0), (), estimators)
    frozen = scored(tmp_path / "frozen", build, adam(weight_decay=0.0), still, estimators)
    for found, expected in zip(trained, frozen, strict=True):
        assert expected.values.abs().max() > 1e-4
        assert relative(found.values, expected.values) < 1e-4


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("bias before BatchNorm", "adagrad"),
        ("bias of a convolution", "rmsprop"),
        pytest.param("bias before BatchNorm", "centered", marks=pytest.mark.slow),
    ],
)
def test_so_does_it_for_other_optimizers(kind: str, name: str, tmp_path: Path) -> None:
    make = {
        "rmsprop": adam(torch.optim.RMSprop),
        "centered": adam(torch.optim.RMSprop, centered=True, momentum=0.5),
        "adagrad": adam(torch.optim.Adagrad, initial_accumulator_value=0.1),
    }[name]
    build, still = KINDS[kind]
    estimators = [Source(1, curvature="exact")]
    (found,) = scored(tmp_path / "trained", build, make, (), estimators)
    (expected,) = scored(tmp_path / "frozen", build, make, still, estimators)
    assert relative(found.values, expected.values) < 1e-3


def test_the_notes_name_what_training_could_not_move(tmp_path: Path) -> None:
    build, _ = KINDS["two layers of it"]
    estimators = [Source(1, curvature="exact"), Source(1, curvature="exact", order="recorded")]
    for scores in scored(tmp_path / "run", build, adam(), (), estimators):
        assert "none of net.0.bias, net.3.bias: training" in str(scores.provenance["notes"])
    build, _ = KINDS["a shift before LayerNorm"]
    (scores,) = scored(tmp_path / "other", build, adam(), (), estimators[:1])
    assert "running statistics" not in str(scores.provenance["notes"])
