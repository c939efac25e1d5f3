"""Runs of one training that differ in chance alone: seeds, order of batches, dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike

from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.records.trajectory import Trajectory


class Ensemble:
    """Recorded runs of one model on one data set, to be attributed together.

    ``AttributionModule(module, trajectory=Ensemble([...]), estimator=...)`` answers what training
    *like these runs* does with an example: scores are the mean over the members, with their
    standard error (``Scores.spread``). A plain list of trajectories means consecutive stages of
    one training instead.

    Args:
        members: at least two trajectories, or their folders.

    Raises:
        ValueError: fewer than two members, or one run given twice.
        TrajectoryMismatchError: the members differ in model or training set; names the difference.
    """

    def __init__(self, members: Sequence[str | PathLike[str] | Trajectory]) -> None:
        if isinstance(members, str | PathLike) or len(members) < 2:
            count = 1 if isinstance(members, str | PathLike | Trajectory) else len(members)
            raise ValueError(
                f"An ensemble needs at least two runs, got {count}. Give a list of trajectories, "
                "or the one trajectory itself."
            )
        self.trajectories = [
            member if isinstance(member, Trajectory) else Trajectory.load(str(member))
            for member in members
        ]
        runs: dict[object, int] = {}
        for number, trajectory in enumerate(self.trajectories, start=1):
            _require_alike(self.trajectories[0], trajectory, number)
            run = trajectory.facts.settings.get("run_id") or id(trajectory)
            if run in runs:
                raise ValueError(
                    f"Members {runs[run]} and {number} of the ensemble are the same run: its "
                    "spread would be too small. Give every run once."
                )
            runs[run] = number

    def __len__(self) -> int:
        return len(self.trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)


def _require_alike(first: Trajectory, other: Trajectory, number: int) -> None:
    """Refuse a member that trained another model or on other data than the first."""
    shapes, own = (
        {name: tuple(fact.shape) for name, fact in run.facts.parameters.items()}
        for run in (first, other)
    )
    differences = [
        f"{name} has shape {list(own[name]) if name in own else 'none'}, expected "
        f"{list(shapes[name]) if name in shapes else 'none'}"
        for name in {**shapes, **own}
        if shapes.get(name) != own.get(name)
    ]
    if differences:
        raise TrajectoryMismatchError(
            f"Member {number} of the ensemble trained another model than member 1: "
            f"{'; '.join(differences[:3])}. Members must differ in chance alone."
        )
    if first.facts.num_examples != other.facts.num_examples:
        raise TrajectoryMismatchError(
            f"Member {number} of the ensemble has another training set than member 1: expected "
            f"{first.facts.num_examples} examples, got {other.facts.num_examples}."
        )
    prints = [dict(run.facts.fingerprint or {}) for run in (first, other)]
    if all(prints) and prints[0] != prints[1]:
        raise TrajectoryMismatchError(
            f"Member {number} of the ensemble has another training set than member 1: as many "
            "examples, but their fingerprints differ. Members must be trained on the same data in "
            "the same order of indices."
        )
