"""Runs of one training that differ in chance alone: seeds, order of batches, dropout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from tda_lightning.records.errors import TrajectoryMismatchError, TrajectoryNotFoundError
from tda_lightning.records.files import StoreFunction
from tda_lightning.records.trajectory import Trajectory

KINDS = ("seeds", "forks", "dropout", "lora")
PLANNED, FINISHED, DIVERGED = "planned", "finished", "diverged"


@dataclass(frozen=True)
class MemberFact:
    """One run of an ensemble.

    Attributes:
        number: counted from 1.
        folder: of its trajectory, relative to the ensemble's folder.
        seed: that it was made from; None for the recorded run, if its seed is not known.
        state: "planned", "finished" or "diverged".
        reason: why it is no member, if it is not.
    """

    number: int
    folder: str
    seed: int | None
    state: str = PLANNED
    reason: str = ""


@dataclass(frozen=True)
class EnsembleFacts:
    """What an ensemble's folder says about it.

    Attributes:
        kind: one of ``KINDS``.
        run: the folder of the recorded run that it was made from, relative to its own.
        run_id: of that run: another one may have been recorded there since.
        members: in order.
        settings: of its kind.
    """

    kind: str
    run: str
    run_id: str | None
    members: tuple[MemberFact, ...]
    settings: Mapping[str, object] = field(default_factory=dict)


class Ensemble:
    """Recorded runs of one model on one data set, to be attributed together.

    ``AttributionModule(module, trajectory=Ensemble([...]), estimator=...)`` answers what training
    *like these runs* does with an example: scores are the mean over the members, with their
    standard error (``Scores.spread``). A plain list of trajectories means consecutive stages of
    one training instead.

    Args:
        members: at least two trajectories, or their folders.

    Attributes:
        trajectories: the members.
        facts: what the folder says, where it was loaded from one; else None.

    Raises:
        TypeError: a member is no run, or a list of stages.
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
        for member in members:
            if not isinstance(member, str | PathLike | Trajectory):
                raise TypeError(
                    "The members of an ensemble must be folders of recorded runs or trajectories, "
                    f"each of one stage; got {member!r:.200}."
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
        self.facts: EnsembleFacts | None = None

    @staticmethod
    def load(path: str | PathLike[str]) -> Ensemble:
        """The finished members of the ensemble in folder ``path``, which ``tda ensemble`` or
        :mod:`tda_lightning.ensembles` made.

        Raises:
            TrajectoryNotFoundError: the folder holds no ensemble, or fewer than two members are
                finished.
            TrajectoryFormatError: a file of it is damaged.
            TrajectoryMismatchError: the recorded run is not the one that it was made from.
        """
        root, facts = Path(path), _read_ensemble(path)
        finished = [member for member in facts.members if member.state == FINISHED]
        if len(finished) < 2:
            raise TrajectoryNotFoundError(
                f"{root} holds {len(finished)} finished of {len(facts.members)} members, expected "
                "at least two. The command (or call) that began the ensemble goes on with it."
            )
        ensemble = Ensemble([folder_within(root, member.folder) for member in finished])
        first = ensemble.trajectories[0].facts.settings.get("run_id")
        if facts.members[0].folder == facts.run and first != facts.run_id:
            raise TrajectoryMismatchError(
                f"{root / facts.run} was recorded again since the ensemble in {root} was made from "
                f"it: expected run {facts.run_id}, got {first}. Delete {root} and make it again."
            )
        ensemble.facts = facts
        return ensemble

    def __len__(self) -> int:
        return len(self.trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)


def folder_within(root: Path, folder: str) -> Path:
    """A folder that an ensemble in ``root`` names, without the ".." in it: it is shown, and kept in
    provenances."""
    path = root / folder
    plain = Path(os.path.normpath(path))
    # They differ where a link leads to the ensemble.
    return plain if plain.exists() and plain.samefile(path) else path


_read_ensemble = StoreFunction[[str | PathLike[str]], EnsembleFacts]("read_ensemble")


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
