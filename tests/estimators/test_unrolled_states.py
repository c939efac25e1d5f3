"""Where states are kept, how queries are grouped and where work was broken off change no bit."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from tda_lightning import Scores, Trajectory
from tda_lightning.edits import Relabel, Removal
from tda_lightning.estimators import Unrolled
from tda_lightning.estimators.unrolled import resume
from tests import oracles
from tests.attributing import relative
from tests.cases.training import MLP, queries_of
from tests.quick import quick
from tests.unrolling import (
    EXACT,
    NETWORKS,
    OPTIMIZERS,
    Network,
    expected_of,
    in_memory,
    record,
    scores_of,
    unroll,
)

pytestmark = pytest.mark.filterwarnings("ignore")

# Two intervals of several steps each.
LONG: dict[str, Any] = {"recorder": {"every_n_steps": 5}, "max_epochs": 2}


@dataclasses.dataclass
class Problem:
    """A recorded run and its scores with everything in memory."""

    network: Network
    run: Trajectory
    module: Any
    data: TensorDataset
    queries: TensorDataset

    def scores(self, data: Any = None, **options: Any) -> Scores:
        given = self.data if data is None else data
        work = (self.run, self.module, given, self.queries, self.network.task)
        edits = options.pop("edits", None)
        return scores_of(*work, Unrolled(**options), edits=edits)

    def first_query(self) -> Problem:
        """The same for one query."""
        one = TensorDataset(*(t[:1] for t in self.queries.tensors))
        return dataclasses.replace(self, queries=one)

    @property
    def least(self) -> int:
        return least_of(lambda: self.scores(memory_budget=1))


def least_of(attributing: Callable[[], Any]) -> int:
    """The least budget, as an error says it."""
    with pytest.raises(ValueError, match="memory_budget is 1 bytes") as error:
        attributing()
    (found,) = re.findall(r"takes (\d+)\.", str(error.value))
    return int(found)


def require_same(one: Scores, other: Scores) -> None:
    """To the bit."""
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.by_segment, other.by_segment)  # type: ignore[arg-type]
    assert one.provenance["certificate"] == other.provenance["certificate"]


@pytest.fixture(
    params=["batch norm nesterov", pytest.param("dropout adamw", marks=pytest.mark.slow)]
)
def problem(request: Any, tmp_path: Path) -> Problem:
    name, _, optimizer = request.param.rpartition(" ")
    network = NETWORKS[name]
    run, module, data = record(tmp_path / "run", network, OPTIMIZERS[optimizer], **LONG)
    return Problem(network, run, module, data, network.data(3, seed=7))


def test_places_and_budgets(problem: Problem, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    expected = problem.scores()
    truth = expected_of(problem.run, problem.network, problem.module, problem.data, problem.queries)
    assert relative(expected.by_segment, truth) < EXACT
    one = problem.first_query()
    alone, least = one.scores(), problem.least
    for states in ("memory", "disk", "recompute", "auto"):
        require_same(problem.scores(states=states), expected)
        for budget in (least, 3 * least):
            require_same(one.scores(states=states, memory_budget=budget), alone)
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("states", ["auto", "recompute"])
def test_too_small_a_budget_is_refused(problem: Problem, states: str) -> None:
    least = problem.least
    problem.scores(states=states, memory_budget=least)
    with pytest.raises(ValueError, match=f"takes {least}\\."):
        problem.scores(states=states, memory_budget=least - 1)


def test_queries_in_rounds(problem: Problem) -> None:
    """Together, or as many at a time as there is memory for: the same to rounding."""
    together = problem.scores()
    rounds = problem.scores(memory_budget=problem.least)
    assert relative(rounds.by_segment, together.by_segment) < 1e-12
    assert rounds.provenance["certificate"] == together.provenance["certificate"]
    alone = problem.first_query().scores()
    assert relative(alone.values, together.values[:1]) < 1e-12


@pytest.mark.parametrize("steps", quick([1, 2, 3, 13], [1, 3, 13]))
def test_pieces_of_every_length(steps: int) -> None:
    """An interval of any number of steps, under the least budget."""
    batches = oracles.cut_batches(10, 4, epochs=5)[:steps]
    run, module, data = in_memory(MLP, OPTIMIZERS["adamw"], batches=batches, checkpoints=())
    expected = unroll(MLP, run, module, data)
    least = least_of(lambda: unroll(MLP, run, module, data, Unrolled(memory_budget=1)))
    # The first step of Adam is nearly the sign of the gradient: its derivative is the small
    # difference of two terms, by way of which the rounding of queries in rounds grows.
    bound = 1e-10 if steps == 1 else 1e-12
    for budget in (least, 3 * least):
        found = unroll(MLP, run, module, data, Unrolled(memory_budget=budget))
        assert relative(found.by_segment, expected.by_segment) < bound


# Broken off and taken up again


@pytest.fixture(autouse=True)
def _kept_often(monkeypatch: Any) -> None:
    """As if every interval took long."""
    monkeypatch.setattr(resume, "_SECONDS", 0.0)


class Interrupted(Dataset):
    """The data, until so many batches' worth of examples have been read."""

    def __init__(self, data: TensorDataset, after: int | None, kind: Any = None) -> None:
        self.data, self.after, self.kind, self.count = data, after, kind, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        if self.after is not None and self.count > self.after:
            raise self.kind
        return self.data[index]


def stopped(problem: Problem, after: int, kind: Any = KeyboardInterrupt, **options: Any) -> None:
    """Attribute until so many examples have been read."""
    with pytest.raises((kind, SystemExit)):
        problem.scores(Interrupted(problem.data, after, kind), **options)


@pytest.mark.parametrize(
    ("kind", "reopened"),
    # In memory: test_a_run_in_memory_keeps_unfinished_work.
    quick([(KeyboardInterrupt, True), (OSError, False)], [(KeyboardInterrupt, True)]),
)
def test_broken_off_work_is_taken_up(problem: Problem, reopened: bool, kind: Any) -> None:
    expected = problem.scores()
    watched = Interrupted(problem.data, None)
    require_same(problem.scores(watched), expected)
    assert not problem.run.unfinished
    whole, fewer = watched.count, 0
    for part in (0.3, 0.7, 0.97):
        stopped(problem, int(part * whole), kind)
        begun = bool(problem.run.unfinished)
        if reopened:
            assert problem.run.path is not None
            problem = dataclasses.replace(problem, run=Trajectory.load(problem.run.path))
            assert bool(problem.run.unfinished) == begun
        rest = Interrupted(problem.data, None)
        require_same(problem.scores(rest), expected)
        assert rest.count < whole if begun else rest.count == whole
        fewer += begun
        assert not problem.run.unfinished
    assert 0 < fewer < 3


def test_work_broken_off_again_and_again(problem: Problem) -> None:
    """Never is there time for all of it."""
    expected = problem.scores()
    watched = Interrupted(problem.data, None)
    problem.scores(watched)
    for _ in range(3):
        try:
            found = problem.scores(Interrupted(problem.data, int(0.95 * watched.count), OSError))
        except OSError:
            continue
        break
    else:
        pytest.fail("it came to no end")
    require_same(found, expected)


@pytest.mark.parametrize("last", quick([None, 7], [7]))
def test_rounds_that_are_done_are_kept(problem: Problem, last: int | None) -> None:
    """Also where the last steps begin in the midst of an interval."""
    options: dict[str, Any] = {"memory_budget": problem.least, "last_steps": last}
    expected = problem.scores(**options)
    watched = Interrupted(problem.data, None)
    problem.scores(watched, **options)
    stopped(problem, watched.count - 3, **options)
    rest = Interrupted(problem.data, None)
    require_same(problem.scores(rest, **options), expected)
    assert rest.count < 0.7 * watched.count
    assert not problem.run.unfinished


@pytest.mark.parametrize(
    "name", quick(["momentum and decay", "adamw", "rmsprop, everything"], ["rmsprop, everything"])
)
def test_a_run_in_memory_keeps_unfinished_work(name: str) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS[name], checkpoints=(2, 5))
    problem = Problem(
        NETWORKS["mlp"], run, module, TensorDataset(*data), TensorDataset(*queries_of(MLP))
    )
    expected = problem.scores()
    watched = Interrupted(problem.data, None)
    problem.scores(watched)
    for part in (0.75, 0.95):
        stopped(problem, int(part * watched.count))
        assert run.unfinished
        require_same(problem.scores(), expected)


def test_tokens_are_kept_with_unfinished_work(tmp_path: Path) -> None:
    """In rounds of queries too, and in a file of scores."""
    network = NETWORKS["transformer"]
    run, module, data = record(tmp_path / "run", network, OPTIMIZERS["adamw"], **LONG)
    problem = Problem(network, run, module, data, network.data(3, seed=7))
    expected = problem.scores(token_weights=True)
    watched = Interrupted(data, None)
    problem.scores(watched, token_weights=True)
    stopped(problem, int(0.9 * watched.count), token_weights=True)
    assert run.unfinished
    found = problem.scores(token_weights=True)
    require_same(found, expected)
    assert torch.equal(found.by_token, expected.by_token)  # type: ignore[arg-type]
    rounds = problem.scores(token_weights=True, memory_budget=problem.least)
    assert relative(rounds.by_token, expected.by_token) < 1e-12  # type: ignore[arg-type]
    path = str(tmp_path / "scores.h5")
    work = (run, module, data, problem.queries, network.task, Unrolled(token_weights=True))
    streamed = scores_of(*work, scores_path=path)
    for one in (streamed, Scores.load(path)):
        require_same(one, expected)
        assert torch.equal(one.by_token, expected.by_token)  # type: ignore[arg-type]


def test_work_of_another_question_is_not_taken_up(problem: Problem) -> None:
    """Other queries, another model of the same shape, other settings."""
    expected = problem.scores()
    watched = Interrupted(problem.data, None)
    problem.scores(watched)
    late = int(0.9 * watched.count)
    moved = TensorDataset(*(t.flip(0) for t in problem.queries.tensors))
    other = dataclasses.replace(problem, queries=moved)
    stopped(other, late)
    assert problem.run.unfinished
    require_same(problem.scores(), expected)
    stopped(problem, late, last_steps=7)
    require_same(problem.scores(), expected)
    label = problem.data.tensors[1][0].tolist()
    edits = [Relabel(0, label), *map(Removal, range(1, len(problem.data)))]
    stopped(problem, late, edits=edits)
    require_same(problem.scores(), expected)
    # An example that is relabelled with its own label does nothing.
    edited = problem.scores(edits=edits)
    assert float(edited.values[:, 0].abs().max()) < 1e-12
    assert relative(edited.values[:, 1:], expected.values[:, 1:]) < 1e-12
