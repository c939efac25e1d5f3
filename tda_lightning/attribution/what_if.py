"""Which runs an attribution is of: the recorded ones, or their what-if runs (``keep``)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tda_lightning.attribution.member_modules import DROPOUT
from tda_lightning.attribution.stages import StageSetup
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.provenance import WhatIfRecord
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.replay.what_if import (
    seconds_of_run,
    subset_weights,
    uniform_weights,
    weights_that_suit,
    what_if_run,
)
from tda_lightning.runtime.loading import ExampleSource

Kind = Literal["uniform", "expected", "subsets"]
SIZES = (
    "roughly predicted: where half of the data would go, sums of scores were mostly 1 to 7 times "
    "the measured change (experiments/question)"
)
DRAWS = 4  # random subsets, where they suit the optimizer


@dataclass(frozen=True)
class AskedRuns:
    """The runs that scores are made of.

    Attributes:
        runs: the stages of each.
        recorded: the recorded run that each belongs to, by its position.
        draws: runs of each recorded one, which follow one another.
        what_if: for the provenance; None for the recorded runs themselves.
    """

    runs: list[list[StageSetup]]
    recorded: list[int]
    draws: int = 1
    what_if: WhatIfRecord | None = None


def asked_runs(
    members: Sequence[Sequence[StageSetup]],
    examples: Sequence[ExampleSource],
    keep: float,
    draws: int | None,
) -> AskedRuns:
    """The runs at which the derivative is taken: for ``keep`` below 1 what-if runs, trained where
    they are not there yet.

    Args:
        members: the stages of the recorded runs, one or several.
        examples: the training set of each recorded stage.
        keep: mean weight of the training examples. What forks have in common with their run at
            equal weights is trained once.
        draws: random subsets; 0: every example at weight ``keep``; None: what suits the optimizer
            (:func:`~tda_lightning.replay.what_if.weights_that_suit`).

    Raises:
        UnsupportedTrainingError: a run cannot be replayed.
        ValueError: a random subset would have every example, or none.
    """
    if keep == 1:
        return AskedRuns([list(stages) for stages in members], list(range(len(members))))
    kind, count = _kind(members, draws)
    if kind == "subsets":
        _require_subsets([len(source) for source in examples], keep)
    # An ensemble asks about training anew, and training on less data takes fewer steps. Weights
    # below 1 shorten the steps of SGD as much; an optimizer that normalises has to be told.
    rate = keep if kind == "expected" and len(members) > 1 else 1.0
    made: list[list[list[StageSetup]]] = []  # the runs of each member, by their stages
    trained = 0
    for number, stages in enumerate(members):
        twin = next((n for n in range(len(made)) if _one_training(members[n], stages)), None)
        if twin is None:
            # Subsets of its own for each member: so the ensemble averages over more of them.
            numbers = range(trained, trained + count)
            trained += count
            # Subsets of their own leave a fork and its run nothing in common.
            common = None if kind == "subsets" else _common(stages, members[:number])
            left = common and (made[common[0]][0][0].trajectory, common[1])
            made.append(
                [_what_if_stages(stages, examples, keep, kind, n, rate, left) for n in numbers]
            )
        else:
            made.append([_seen_by(stages, run) for run in made[twin]])
    runs = [run for own in made for run in own]
    record: WhatIfRecord = {
        "keep": keep,
        "weights": kind,
        "rate": rate,
        "runs": [stage.trajectory.path or "in memory" for stages in runs for stage in stages],
    }
    if kind == "subsets":
        record["draws"] = count
    recorded = [number for number in range(len(members)) for _ in range(count)]
    return AskedRuns(runs, recorded, count, record)


def seconds_of_runs(
    members: Sequence[Sequence[StageSetup]],
    examples: Sequence[ExampleSource],
    draws: int | None,
) -> tuple[int, int, float]:
    """How many what-if runs are scored, how many are trained for them (members that are one run
    under dropout masks share theirs), and about how long each takes to train."""
    kind, count = _kind(members, draws)
    seconds = 0.0
    for stage in members[0]:
        source, expected = examples[stage.run], kind == "expected"
        # Stages may differ in their optimizers.
        expected = expected and weights_that_suit(stage.trajectory) == "expected"
        with _explained():
            seconds += seconds_of_run(stage.trajectory, stage.module, stage.task, source, expected)
    trained = [
        stages
        for number, stages in enumerate(members)
        if not any(_one_training(other, stages) for other in members[:number])
    ]
    if kind != "subsets":
        # What forks have in common with their run is trained once.
        common = [_common(stages, members[:number]) for number, stages in enumerate(members)]
        past = sum(step for _, step in filter(None, common))
        seconds *= 1 - past / (len(trained) * members[0][0].trajectory.last_step)
    return len(members) * count, len(trained) * count, seconds


def _kind(members: Sequence[Sequence[StageSetup]], draws: int | None) -> tuple[Kind, int]:
    """Which weights, and how many what-if runs of each run."""
    if draws is not None:
        return ("subsets", draws) if draws else ("uniform", 1)
    with _explained():
        suiting = {weights_that_suit(stage.trajectory) for stages in members for stage in stages}
    if "subsets" in suiting:
        return "subsets", DRAWS
    return "expected" if "expected" in suiting else "uniform", 1


def _require_subsets(sizes: Sequence[int], keep: float) -> None:
    """Refuse random subsets that are the whole training set, whose run is the recorded one, or
    empty.

    Raises:
        ValueError: says what to ask.
    """
    for size in sizes:
        kept = round(keep * size)
        if not 0 < kept < size:
            raise ValueError(
                f"keep={keep:g} keeps {kept} of {size} training examples, and random subsets must "
                f"keep some and leave some out. Ask with draws=0 (every example at weight "
                f"{keep:g}), or with another keep."
            )


def _what_if_stages(
    stages: Sequence[StageSetup],
    examples: Sequence[ExampleSource],
    keep: float,
    kind: Kind,
    number: int,
    rate: float,
    left: tuple[Trajectory, int] | None = None,
) -> list[StageSetup]:
    """The stages of one what-if run, each of which begins where the one before it ended.

    Args:
        number: of the random subset.
        left: the what-if run of the run that this one left, and after how many steps.
    """
    made: list[StageSetup] = []
    before: list[tuple[Trajectory, Trajectory]] = []
    for stage in stages:
        source = examples[stage.run]
        if kind == "subsets":
            weights = subset_weights(len(source), keep, number + 1)[number]
        else:
            weights = uniform_weights(len(source), keep)[0]
        # Stages may differ in their optimizers.
        expected = kind == "expected" and weights_that_suit(stage.trajectory) == "expected"
        # A task remembers what it saw of its run's batches.
        task = copy.deepcopy(stage.task)
        with _explained():
            run = what_if_run(
                stage.trajectory, stage.module, task, source, weights, before, expected, rate, left
            )
        before.append((stage.trajectory, run))
        made.append(replace(stage, trajectory=run, task=copy.deepcopy(stage.task)))
    return made


def _common(
    stages: Sequence[StageSetup], before: Sequence[Sequence[StageSetup]]
) -> tuple[int, int] | None:
    """Which of the members before it a fork left, and after how many steps; None where it is no
    fork, or of none of them."""
    own = stages[0].trajectory
    fork: Any = own.facts.settings.get("fork")
    if fork is None or len(stages) > 1 or fork["step"] not in own.checkpoints:
        return None
    for number, others in enumerate(before):
        run, step = others[0].trajectory, fork["step"]
        if run.facts.settings.get("run_id") != fork["run"] or len(others) > 1:
            continue
        checkpoints = [[at for at in one.checkpoints if at <= step] for one in (run, own)]
        rows = [one.steps.between(0, step).examples for one in (run, own)]
        if checkpoints[0] == checkpoints[1] and torch.equal(*rows):
            return number, step
    return None


def _one_training(stages: Sequence[StageSetup], others: Sequence[StageSetup]) -> bool:
    """Whether two members are one run under different dropout masks. Masks are off in training, so
    that what-if runs of theirs are the same."""
    return len(stages) == len(others) and all(
        DROPOUT in one.trajectory.facts.settings
        and _without_mask(one.trajectory) == _without_mask(other.trajectory)
        and one.trajectory.checkpoints.keys() == other.trajectory.checkpoints.keys()
        and all(
            _equal(one.trajectory, other.trajectory, step) for step in (0, one.trajectory.last_step)
        )
        for one, other in zip(stages, others, strict=True)
    )


def _without_mask(trajectory: Trajectory) -> dict[str, object]:
    settings = trajectory.facts.settings
    return {key: own for key, own in settings.items() if key not in (DROPOUT, "run_id")}


def _equal(one: Trajectory, other: Trajectory, step: int) -> bool:
    own, others = one.checkpoints[step].parameters, other.checkpoints[step].parameters
    return own.keys() == others.keys() and all(torch.equal(own[n], others[n]) for n in own)


def _seen_by(stages: Sequence[StageSetup], trained: Sequence[StageSetup]) -> list[StageSetup]:
    """The what-if run of another member as one of this member's masks."""
    seen = []
    for stage, run in zip(stages, trained, strict=True):
        mask = stage.trajectory.facts.settings[DROPOUT]
        facts = run.trajectory.facts
        facts = replace(facts, settings={**facts.settings, DROPOUT: mask})
        trajectory = replace(run.trajectory, facts=facts)
        seen.append(replace(stage, trajectory=trajectory, task=copy.deepcopy(stage.task)))
    return seen


@contextmanager
def _explained() -> Iterator[None]:
    """Say what an error about a replay has to do with ``keep``."""
    try:
        yield
    except UnsupportedTrainingError as error:
        raise UnsupportedTrainingError(
            "keep below 1 trains the run again with weights on its examples, which this run does "
            f"not allow: {error} The recorded run itself can be asked with keep=1."
        ) from error


def question_of(record: WhatIfRecord) -> str:
    """The question that scores at a what-if run answer, in words.

    Example:
        >>> question_of({"keep": 0.8, "weights": "uniform"})
        'what if about 20% of the training data were gone (derivative where every example has \
weight 0.8)'
    """
    gone = 1 - record["keep"]
    share = "half" if abs(gone - 0.5) < 0.005 else f"{gone:.2g}" if gone < 0.005 else f"{gone:.0%}"
    if record["weights"] != "subsets":
        where = f"derivative where every example has weight {record['keep']:g}"
        if record["weights"] == "expected":
            where += ", with the second moments that this would leave"
            if record["rate"] != 1:
                where += f" and {record['rate']:g} times the rates, as for training on less data"
    else:
        where = (
            f"derivative where a random subset of {record['keep']:.0%} has weight 1 and the rest 0"
        )
        if record["draws"] > 1:
            where += f", mean over {record['draws']} subsets"
    return f"what if about {share} of the training data were gone ({where})"
