"""Whether a run is smooth in its examples' weights, on runs whose answer is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from tda_lightning import Trajectory
from tda_lightning.evaluation import (
    Estimate,
    Smoothness,
    draw_subsets,
    smoothness,
)
from tda_lightning.evaluation.smoothness import THRESHOLD, _agreement_of_signs, _rank_agreement
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.runtime.random_states import Snapshot
from tda_lightning.tasks import AttributionTask
from tests import oracles

NUM_TRAIN, WIDTH = 40, 12


class Point(nn.Module):
    """Nothing but parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.linspace(-0.8, 0.9, WIDTH, dtype=torch.float64))


class Bowl(AttributionTask):
    """Half the squared distance to the example; a query asks for a linear form of the place."""

    def train_loss(self, module: nn.Module, batch) -> Tensor:
        return 0.5 * (module.place - batch[0]).square().sum(1)

    def measurement(self, module: nn.Module, batch) -> Tensor:
        return batch[0] @ module.place


class TwoWells(Bowl):
    """(x^2 - a)^2 / 4: at a large rate, gradient descent on it is chaotic and stays bounded."""

    def train_loss(self, module: nn.Module, batch) -> Tensor:
        return 0.25 * (module.place.square() - 1 - 0.1 * batch[0]).square().sum(1)


def examples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, WIDTH, generator=generator, dtype=torch.float64))


def recorded(task: AttributionTask, rate: float, steps: int) -> Trajectory:
    """Full batches, so that each step is a known map of the weights."""
    everything = [[list(range(NUM_TRAIN))]] * steps
    return oracles.record_run(
        Point(),
        task.train_loss,
        examples(NUM_TRAIN, 0).tensors,
        lambda m: torch.optim.SGD(m.parameters(), rate),
        everything,
        checkpoints=(),
    )


def found(
    task: AttributionTask, rate: float, steps: int, data: Dataset | None = None, **options
) -> Smoothness:
    run = recorded(task, rate, steps)
    data = data or examples(NUM_TRAIN, 0)
    return smoothness(run, Point(), task, data, examples(30, 1), **{"directions": 4, **options})


# Known answers


def test_one_step_is_linear_in_the_weights() -> None:
    """theta - rate x the weighted mean gradient: halves and shares predict the whole exactly."""
    result = found(Bowl(), 0.5, 1)
    for number in (result.metasmoothness, result.halfway, result.near):
        assert number.value == pytest.approx(1)
        assert number.low == pytest.approx(1)
    assert result.landing_error < 1e-12
    assert result.verdict == "smooth"
    assert result.advice.startswith("Smooth: half of leaving out")


def test_many_steps_on_a_quadratic_are_smooth() -> None:
    """The end is a smooth function of the weights: a weighted mean, nearly."""
    result = found(Bowl(), 0.2, 20)
    assert result.metasmoothness.value > 0.95
    assert result.near.value > 0.95
    assert result.verdict == "smooth"


def test_metasmoothness_is_the_definition() -> None:
    """Replayed by the oracles, coordinate by coordinate."""
    task, data = TwoWells(), examples(NUM_TRAIN, 0)
    run = recorded(task, 1.2, 6)
    result = smoothness(
        run, Point(), task, data, examples(5, 1), directions=3, fraction=0.1, seed=4
    )
    kept = draw_subsets(NUM_TRAIN, 0.9, count=3, seed=4)

    def end(weights: Tensor) -> Tensor:
        state = oracles.replay(run, Point(), task.train_loss, data.tensors, weights)
        return state["place"].detach()

    for direction, weights in enumerate(kept.double()):
        start, half, whole = (end(w) for w in (torch.ones(NUM_TRAIN), (1 + weights) / 2, weights))
        agreed = total = 0.0
        for i in range(WIDTH):
            size = abs(float(whole[i] - start[i]))
            agreed += size * float((half[i] - start[i]).sign() * (whole[i] - half[i]).sign())
            total += size
        expected = agreed / total
        assert float(result.metasmoothness.per_direction[direction]) == pytest.approx(expected)


def test_agreement_of_signs_by_hand() -> None:
    start = {"a": torch.zeros(2), "b": torch.zeros(1)}
    half = {"a": torch.ones(2), "b": torch.ones(1)}
    whole = {"a": torch.tensor([2.0, 0.5]), "b": torch.tensor([-1.0])}
    # Sizes 2, 0.5 and 1; the first moves on, the others turn back.
    assert _agreement_of_signs(["a", "b"], start, half, whole) == pytest.approx(0.5 / 3.5)
    assert math.isnan(_agreement_of_signs(["a", "b"], start, start, start))


def test_a_chaotic_run_is_rough() -> None:
    """x -> (1 + r) x - r x^3 with r = 1.9: a thousandth of the change ends anywhere."""
    result = found(TwoWells(), 1.9, 80, directions=8)
    assert result.metasmoothness.value < 0.7
    assert result.halfway.high < THRESHOLD
    assert result.verdict == "rough"
    assert "Do not trust Unrolled" in result.advice
    assert "check them by retraining" in result.advice


# The interval and the verdict


def test_the_interval_covers_the_mean() -> None:
    samples = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.3
    intervals = [Estimate.of(row) for row in samples]
    covered = sum(one.low <= 0.3 <= one.high for one in intervals) / len(intervals)
    assert 0.93 < covered < 0.97


@pytest.mark.slow
def test_the_interval_of_a_rank_agreement_covers_it() -> None:
    """Directions act through a few features of the queries, as removals do."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    signal, other = normal(5, 60), normal(5, 60)

    def changes(directions: int) -> tuple[Tensor, Tensor]:
        whole = normal(directions, 5) @ signal
        return whole + normal(directions, 5) @ other, whole

    truth = _rank_agreement(*changes(1000)).value
    found = [_rank_agreement(*changes(6)) for _ in range(300)]
    covered = sum(one.low <= truth <= one.high for one in found) / len(found)
    assert 0.9 < covered < 0.99


def test_a_change_that_all_directions_share_is_no_agreement() -> None:
    """What a rough run's own start has in common with all differences from it."""
    generator = torch.Generator().manual_seed(0)
    some, whole = torch.randn(2, 8, 100, generator=generator)
    shared = 5 * torch.randn(100, generator=generator)
    found = _rank_agreement(some + shared, whole + shared)
    assert found.low < 0 < found.high
    assert _rank_agreement(some, some + shared).value > 0.99


def test_the_interval_stays_within_its_bounds_and_skips_what_is_not_known() -> None:
    found = Estimate.of(torch.tensor([1.0, -1.0, math.nan]))
    assert (found.value, found.low, found.high) == (0, -1, 1)
    assert math.isnan(Estimate.of(torch.tensor([0.5, math.nan])).low)


@pytest.mark.parametrize(
    ("low", "high", "noise", "verdict"),
    [
        (THRESHOLD, 1.0, 0.0, "smooth"),
        (THRESHOLD - 0.01, 1.0, 0.0, "undecided"),
        (0.1, THRESHOLD - 0.01, 0.0, "rough"),
        (THRESHOLD, 1.0, 0.5, "undecided"),
        (math.nan, math.nan, 0.0, "undecided"),
        (THRESHOLD, 1.0, math.nan, "undecided"),
    ],
)
def test_the_verdict_asks_where_the_whole_interval_is(low, high, noise, verdict) -> None:
    result = found(Bowl(), 0.5, 1)
    estimate = Estimate(torch.zeros(2), (low + high) / 2, low, high)
    result = dataclasses.replace(result, halfway=estimate, noise=noise)
    assert result.verdict == verdict
    assert result.advice.startswith(verdict.capitalize())


def test_nothing_that_changes_is_nothing_found() -> None:
    result = found(Bowl(), 0.0, 2)
    assert math.isnan(result.metasmoothness.value)
    assert result.verdict == "undecided"
    assert "changed too few measurements" in result.advice


class Noisy(Dataset):
    """Examples with noise of a generator that nobody records."""

    def __init__(self) -> None:
        self.places = examples(NUM_TRAIN, 0).tensors[0]
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.places[index] + torch.from_numpy(0.5 * self.generator.standard_normal(WIDTH)),)


def test_replays_that_differ_from_one_another_are_noticed() -> None:
    result = found(Bowl(), 0.2, 5, Noisy())
    assert result.noise > 1
    assert result.landing_error > 0
    assert result.verdict == "undecided"
    assert "replays with the same weights differ" in result.advice
    assert found(Bowl(), 0.2, 5).noise == 0


# Settings


def test_the_seed_decides_and_generators_are_left_alone() -> None:
    before = Snapshot.take()
    one, again = (found(TwoWells(), 1.2, 6, seed=3) for _ in range(2))
    assert Snapshot.take() == before
    for name in ("metasmoothness", "halfway", "near"):
        first, second = getattr(one, name), getattr(again, name)
        assert torch.equal(first.per_direction, second.per_direction)
    other = found(TwoWells(), 1.2, 6, seed=4)
    assert not torch.equal(one.halfway.per_direction, other.halfway.per_direction)


def test_replays_are_counted_and_the_module_is_put_back() -> None:
    run, module = recorded(Bowl(), 0.2, 5), Point()
    before = module.place.detach().clone()
    result = smoothness(
        run, module, Bowl(), examples(NUM_TRAIN, 0), examples(30, 1), directions=3, fraction=0.2
    )
    assert torch.equal(module.place, before)
    assert result.replays == 10 + (result.landing_error > 0)
    assert len(result.halfway.per_direction) == 3
    assert result.fraction == 0.2
    assert result.seconds > 0


def test_trained_together_it_is_the_same() -> None:
    one, together = (found(Bowl(), 0.2, 10, together=count) for count in (1, 5))
    for name in ("metasmoothness", "halfway", "near"):
        first, second = getattr(one, name), getattr(together, name)
        torch.testing.assert_close(first.per_direction, second.per_direction, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 2}, "needs at least 3 directions, got directions=2"),
        ({"fraction": 0.0}, "fraction must be between 0 and 1"),
        ({"fraction": 1.0}, "fraction must be between 0 and 1"),
        ({"fraction": math.nan}, "fraction must be between 0 and 1"),
        ({"fraction": 0.001}, "leave out some of 40 training examples but not all, got 0.001"),
        ({"share": 0.5}, "share must be above 0 and below 0.5, got 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        found(Bowl(), 0.2, 1, **options)


def test_too_few_queries_and_no_indices_are_refused() -> None:
    run, data = recorded(Bowl(), 0.2, 2), examples(NUM_TRAIN, 0)
    with pytest.raises(ValueError, match="at least 3 queries, got 2"):
        smoothness(run, Point(), Bowl(), data, examples(2, 1))
    steps = dataclasses.replace(run.steps, examples=torch.empty(0, dtype=torch.int64))
    run = dataclasses.replace(run, steps=steps)
    with pytest.raises(UnsupportedTrainingError, match="no example indices"):
        smoothness(run, Point(), Bowl(), data, examples(30, 1))
