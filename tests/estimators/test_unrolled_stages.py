"""Exact unrolling over several stages: autograd through all of them, and retraining them all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Scores
from tda_lightning.estimators import Unrolled
from tda_lightning.estimators.unrolled import resume
from tda_lightning.records.errors import TrajectoryMismatchError
from tests.attributing import quiet, relative
from tests.estimators.test_stages import DIFFERENT, SAME_LOSS, Problem, problem
from tests.oracles.stages import replay_stages
from tests.oracles.unrolling import _call
from tests.processes import results
from tests.two_stages import CONVOLUTION, MLP, TIED, two_stages
from tests.unrolling import EXACT, OPTIMIZERS, adam, adamw, in_eval_mode, sgd

pytestmark = pytest.mark.filterwarnings("ignore")

ADAMW = adam(adamw, weight_decay=0.3)
TRUNK = ("0", "1", "5", "6")  # of the convolution
STAGES: dict[str, tuple[Any, ...]] = {
    # Networks, what stage 2 freezes, and what it keeps in eval mode.
    "a new head": (MLP, (), ()),
    "a frozen trunk": (MLP, ("0", "3"), ()),
    "batch norm": (CONVOLUTION, (), ()),
    "batch norm, frozen": (CONVOLUTION, TRUNK, ()),
    "batch norm, frozen in eval mode": (CONVOLUTION, TRUNK, ("1", "6")),
    "batch norm, one in eval mode": (CONVOLUTION, ("0",), ("1",)),
    "tied": (TIED, (), ()),
    "tied, embeddings frozen": (TIED, ("tokens", "positions"), ()),
}
PAIRS = {
    "sgd": (sgd(momentum=0.8), sgd(momentum=0.8, weight_decay=0.1)),
    "adamw": (ADAMW, ADAMW),
    "sgd, then adamw": (sgd(momentum=0.8, nesterov=True), ADAMW),
}
QUICK = [("sgd", "batch norm, frozen in eval mode"), ("sgd, then adamw", "tied")]


def require_equal(scores: Scores, stages: list[Tensor]) -> None:
    """Scores by segment are those of the stages, each with columns of its own."""
    assert scores.values.dtype == torch.float64 and scores.by_segment is not None
    segments, columns = (sum(own.shape[axis] for own in stages) for axis in (0, 2))
    assert scores.by_segment.shape == (segments, len(scores.values), columns)
    expected = torch.zeros_like(scores.by_segment)
    segment = column = 0
    for own in stages:
        part = slice(segment, segment + len(own)), slice(None), slice(column, column + own.shape[2])
        expected[part] = own
        assert own.abs().max() > 1e-6
        assert relative(scores.by_segment[part], own) < EXACT
        segment, column = segment + len(own), column + own.shape[2]
    assert relative(scores.by_segment, expected) < EXACT
    assert relative(scores.values, expected.sum(0)) < EXACT
    assert scores.provenance["certificate"]["relative_difference"] < 1e-9


# Recorded by Lightning, in train mode


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        pytest.param(pair, name, marks=() if (pair, name) in QUICK else pytest.mark.slow)
        for pair in PAIRS
        for name in STAGES
    ],
)
def test_both_stages_are_differentiated(pair: str, name: str, tmp_path: Path) -> None:
    networks, frozen, still = STAGES[name]
    work = two_stages(tmp_path, networks, PAIRS[pair], frozen, still)
    found = work.scores(Unrolled())
    require_equal(found, work.expected())
    assert found.provenance["segments"][-1] == [8, 10]
    if (pair, name) not in QUICK:
        some = [0, 7]
        assert relative(found.values[:, some], work.differences(some)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a new head", "batch norm, frozen"])
def test_examples_that_both_stages_draw(name: str, tmp_path: Path) -> None:
    """Each stage has a column for its own use of them; leaving one out of both is their sum."""
    networks, frozen, still = STAGES[name]
    if name == "a new head":
        networks = (MLP[0], MLP[0])
    data = networks[0].data(10)
    work = two_stages(tmp_path, networks, PAIRS["adamw"], frozen, still, data=[data, data])
    found = work.scores(Unrolled(), data=data)
    assert found.values.shape == (3, 20)
    some = [0, 3]
    both = found.stage(0).values + found.stage(1).values
    assert relative(both[:, some], work.differences(some, together=True)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a frozen trunk", "batch norm, frozen in eval mode", "tied"])
def test_what_if_runs_of_recorded_stages(name: str, tmp_path: Path) -> None:
    """``keep``, where frozen weights and running statistics are those of the what-if run before."""
    networks, frozen, still = STAGES[name]
    work = two_stages(tmp_path, networks, PAIRS["sgd"], frozen, still)
    found = work.scores(Unrolled(), keep=0.6)
    require_equal(found, work.expected(0.6))
    assert relative(work.scores(Unrolled()).values, found.values) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch norm, frozen in eval mode", "tied"])
def test_running_statistics_and_rounds_in_directions(name: str, tmp_path: Path) -> None:
    """``query_tolerance`` goes through stages: many queries of few directions."""
    networks, frozen, still = STAGES[name]
    work = two_stages(tmp_path, networks, PAIRS["sgd"], frozen, still)
    work.queries = torch.utils.data.ConcatDataset([work.queries] * 4)
    exact, truncated = (work.scores(Unrolled(query_tolerance=t)) for t in (0.0, 1e-6))
    assert truncated.provenance["directions"]["kept"] == 3
    assert relative(truncated.by_segment, exact.by_segment) < 1e-6
    assert truncated.provenance["directions"]["error_bound"] < 1e-3


# In memory, in eval mode


def staged(*arguments: Any, **options: Any) -> Problem:
    work = problem(*arguments, **{"batches": 4, **options})
    for stage in work.stages:
        run = in_eval_mode(stage.trajectory, stage.module)
        work.stages[work.stages.index(stage)] = dataclasses.replace(stage, trajectory=run)
    return work


def by_columns(work: Problem, at: float = 1.0) -> Tensor:
    """Autograd through all stages at weights ``at``, [query, train]."""
    weights = [
        torch.full((len(stage.data[0]),), at, dtype=torch.float64, requires_grad=True)
        for stage in work.stages
    ]
    values = replay_stages(work.stages, weights)
    last = work.stages[-1]
    measured = _call(last.module, last.loss, values, work.queries)
    rows = [torch.cat(torch.autograd.grad(m, weights, retain_graph=True)) for m in measured]
    return -torch.stack(rows)


FAST = ("momentum and decay", "adamw", "muon, everything")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in OPTIMIZERS
        if "groups" not in name
    ],
)
def test_every_optimizer(name: str, frozen: bool) -> None:
    work = staged(optimizers=(OPTIMIZERS[name],) * 2, frozen=frozen)
    truth, found = work.unrolled(), work.scores(Unrolled())
    assert truth[:, :10].abs().max() > 1e-5
    assert relative(found.values[:, :10], truth[:, :10]) < EXACT
    assert relative(found.values, truth) < EXACT


def test_three_stages_a_head_that_ends_and_a_trunk_that_thaws() -> None:
    plan = (*DIFFERENT, (5, 2, "regression", 4))
    work = staged(plan, (OPTIMIZERS["adamw"], OPTIMIZERS["momentum"], OPTIMIZERS["sgd"]), False)
    found, truth = work.scores(Unrolled()), work.unrolled()
    assert relative(found.values, truth) < EXACT
    assert [row["columns"] for row in found.provenance["stages"]] == [[0, 10], [10, 16], [16, 21]]
    assert found.provenance["segments"][-1] == [16, 18]
    assert found.provenance["checkpoints"] == list(range(0, 19, 2))
    assert found.provenance["certificate"]["checkpoints"] == 9
    assert any("No self-influence" in note for note in found.provenance["notes"])


@pytest.mark.parametrize("steps", [4, 9])
def test_the_last_steps_alone(steps: int) -> None:
    """Within stage 2, and from the midst of stage 1."""
    work = staged(optimizers=(OPTIMIZERS["momentum"],) * 2, frozen=False)
    found = work.scores(Unrolled(last_steps=steps))
    whole = work.scores(Unrolled())
    segments = -(-steps // 2)
    assert relative(found.by_segment[-(steps // 2) :], whole.by_segment[-(steps // 2) :]) < 1e-12
    assert bool(found.by_segment[-segments].abs().max() > 0)
    assert float(found.by_segment[:-segments].abs().sum()) == 0
    assert found.provenance["replayed_steps"] == [14 - steps, 14]
    assert any(f"the last {steps} of 14 steps" in note for note in found.provenance["notes"])


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_at_other_weights(name: str) -> None:
    """``keep``: the what-if run of stage 2 begins where that of stage 1 ended."""
    work = staged(optimizers=(OPTIMIZERS[name],) * 2, frozen=name == "momentum")
    found = work.scores(Unrolled(), keep=0.6, draws=0)
    truth = by_columns(work, 0.6)
    assert relative(found.values, truth) < EXACT
    assert relative(by_columns(work), truth) > 1e-3
    draws = work.scores(Unrolled(), keep=0.5, draws=2)
    assert draws.values.shape == truth.shape and draws.spread is not None


def test_places_budgets_and_one_module() -> None:
    """Whatever is kept where, and where one module is trained in both stages."""
    work = staged(SAME_LOSS, (OPTIMIZERS["adamw"],) * 2, frozen=False)
    expected = work.scores(Unrolled())
    for options in ({"states": "disk"}, {"states": "recompute"}, {"memory_budget": 6000}):
        assert relative(work.scores(Unrolled(**options)).values, expected.values) < 1e-12
    with pytest.raises(ValueError, match="memory_budget is 100 bytes"):
        work.scores(Unrolled(memory_budget=100))
    attribution = AttributionModule(
        work.stages[0].module,
        [stage.trajectory for stage in work.stages],
        Unrolled(),
        work.tasks[0],
    )
    found = attribution.attribute(
        [TensorDataset(*stage.data) for stage in work.stages],
        TensorDataset(*work.queries),
        4,
        quiet(),
    )
    assert torch.equal(found.values, expected.values)


class Stops(TensorDataset):
    """Data that counts how often it is read, and can be read so many times."""

    count, most = 0, None

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        if self.most is not None and self.count > self.most:
            raise OSError("broken off")
        return super().__getitem__(index)


@pytest.mark.parametrize("budget", [None, pytest.param(6000, marks=pytest.mark.slow)])
def test_broken_off_work_is_taken_up(budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either stage, in one round of queries or several."""
    monkeypatch.setattr(resume, "_SECONDS", 0.0)
    work = staged(optimizers=(OPTIMIZERS["adamw"],) * 2, frozen=True)
    runs = [stage.trajectory for stage in work.stages]

    def scored(data: list[Stops]) -> Scores:
        attribution = AttributionModule(
            [stage.module for stage in work.stages],
            runs,
            Unrolled(memory_budget=budget),
            work.tasks,
        )
        return attribution.attribute(data, TensorDataset(*work.queries), 4, quiet())

    def fresh() -> list[Stops]:
        return [Stops(*stage.data) for stage in work.stages]

    whole = fresh()
    expected = scored(whole)
    for number, part in ((0, 0.95), (1, 0.95), (0, 0.6)):
        data = fresh()
        data[number].most = int(part * whole[number].count)
        with pytest.raises(OSError, match="broken off"):
            scored(data)
        begun = bool(runs[-1].unfinished)
        assert begun or part < 0.9
        rest = fresh()
        found = scored(rest)
        assert torch.equal(found.by_segment, expected.by_segment)
        assert found.provenance["certificate"] == expected.provenance["certificate"]
        assert not runs[-1].unfinished
        if begun and number == 0:  # stage 2 was done
            assert rest[1].count < whole[1].count


def score_stages(rank: int) -> Tensor:
    work = staged(optimizers=(OPTIMIZERS["momentum"],) * 2)
    trainer = quiet(devices=2, strategy="ddp")
    return work.scores(Unrolled(), trainer).by_segment


def test_two_processes() -> None:
    work = staged(optimizers=(OPTIMIZERS["momentum"],) * 2)
    expected = work.scores(Unrolled()).by_segment
    for found in results(score_stages):
        torch.testing.assert_close(found, expected)


def test_a_stage_that_is_not_replayed_is_named() -> None:
    work = staged(frozen=False)
    last = work.stages[1].trajectory.checkpoints[6].parameters["head.weight"]
    last += 0.5
    with pytest.raises(TrajectoryMismatchError, match="Stage 2: Replayed .* after step 6"):
        work.scores(Unrolled())
    found = work.scores(Unrolled(tolerance=1e3))
    assert not found.provenance["certificate"]["bit_equal"]
