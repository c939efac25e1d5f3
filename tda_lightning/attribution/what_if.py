"""Which runs an attribution is of: the recorded ones, or their what-if runs (``keep``)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

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
    "roughly predicted: where much of the data would go, sums of scores were up to 3 times larger "
    "than the measured change (experiments/question)"
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
        keep: mean weight of the training examples.
        draws: random subsets; 0: every example at weight ``keep``; None: what suits the optimizer
            (:func:`~tda_lightning.replay.what_if.weights_that_suit`).

    Raises:
        UnsupportedTrainingError: a run cannot be replayed.
    """
    if keep == 1:
        return AskedRuns([list(stages) for stages in members], list(range(len(members))))
    kind, count = _kind(members, draws)
    # An ensemble asks about training anew, and training on less data takes fewer steps. Weights
    # below 1 shorten the steps of SGD as much; an optimizer that normalises has to be told.
    rate = keep if kind == "expected" and len(members) > 1 else 1.0
    runs = [
        _what_if_stages(stages, examples, keep, kind, number, rate)
        for stages in members
        for number in range(count)
    ]
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
) -> tuple[int, float]:
    """How many what-if runs there are, and about how long each takes to train."""
    kind, count = _kind(members, draws)
    seconds = 0.0
    for stage in members[0]:
        source, expected = examples[stage.run], kind == "expected"
        # Stages may differ in their optimizers.
        expected = expected and weights_that_suit(stage.trajectory) == "expected"
        with _explained():
            seconds += seconds_of_run(stage.trajectory, stage.module, stage.task, source, expected)
    return len(members) * count, seconds


def _kind(members: Sequence[Sequence[StageSetup]], draws: int | None) -> tuple[Kind, int]:
    """Which weights, and how many what-if runs of each run."""
    if draws is not None:
        return ("subsets", draws) if draws else ("uniform", 1)
    with _explained():
        suiting = {weights_that_suit(stage.trajectory) for stages in members for stage in stages}
    if "subsets" in suiting:
        return "subsets", DRAWS
    return "expected" if "expected" in suiting else "uniform", 1


def _what_if_stages(
    stages: Sequence[StageSetup],
    examples: Sequence[ExampleSource],
    keep: float,
    kind: Kind,
    number: int,
    rate: float,
) -> list[StageSetup]:
    """The stages of one what-if run, each of which begins where the one before it ended."""
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
                stage.trajectory, stage.module, task, source, weights, before, expected, rate
            )
        before.append((stage.trajectory, run))
        made.append(replace(stage, trajectory=run, task=copy.deepcopy(stage.task)))
    return made


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
