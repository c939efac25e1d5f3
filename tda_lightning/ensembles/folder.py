"""An ensemble's folder: ``ensemble/KIND`` beside the recorded run, a trajectory for each member.

Its file names all members before the first one is trained. A member counts once it is noted as
finished, so one that was cut off is not mistaken for a run.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from tda_lightning.records.ensemble import (
    DIVERGED,
    FINISHED,
    KINDS,
    PLANNED,
    EnsembleFacts,
    MemberFact,
)
from tda_lightning.records.errors import (
    NonFiniteError,
    TrajectoryError,
    TrajectoryLockedError,
    TrajectoryMismatchError,
)
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.formatting import readable_bytes
from tda_lightning.store import layout
from tda_lightning.store.atomic_write import make_folder
from tda_lightning.store.ensemble_file import is_ensemble, read_ensemble, write_ensemble
from tda_lightning.store.lock import FolderLock
from tda_lightning.store.reader import read_facts, require_trajectory

FOLDER = "ensemble"
_PATIENCE = 30.0  # seconds to wait for another process that notes a member


def folder_of(run: str | os.PathLike[str], kind: str) -> Path:
    """The folder of a run's ensemble.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    return Path(run) / FOLDER / kind


def begin(
    run: str | os.PathLike[str],
    kind: str,
    members: int,
    settings: Mapping[str, object] | None = None,
    with_run: bool = True,
) -> Path:
    """Plan an ensemble of ``members`` runs, or more of one that is there; its folder.

    Args:
        run: folder of the recorded run.
        settings: of the kind. Members of one ensemble are made alike.
        with_run: whether the recorded run is its first member.

    Raises:
        TrajectoryNotFoundError: there is no recorded run.
        ValueError: fewer than two members, or the ensemble that is there was made with other
            settings.
        TrajectoryMismatchError: another run has been recorded there since it was begun.
    """
    root, given = folder_of(run, kind), dict(settings or {})
    require_trajectory(Path(run))
    if members < 2:
        raise ValueError(f"An ensemble needs at least two members, got members={members}.")
    base = Path(os.path.relpath(run, root)).as_posix()
    known = read_facts(Path(run)).settings
    recorded, run_id = _seed(known), known.get("run_id")
    with _noting(root):
        facts = EnsembleFacts(kind, base, run_id, (), given)
        if is_ensemble(root):
            facts = read_ensemble(root)
            if facts.run_id != run_id:
                raise TrajectoryMismatchError(
                    f"{run} was recorded again since the ensemble in {root} was made from it: "
                    f"expected run {facts.run_id}, got {run_id}. Delete {root} and make it again."
                )
            if facts.settings != given:
                raise ValueError(
                    f"The ensemble in {root} was made with {dict(facts.settings)}, got {given}. "
                    "Ask for the same settings, or delete the folder."
                )
        planned = list(facts.members)
        for number in range(len(planned) + 1, members + 1):
            if number == 1 and with_run:
                planned.append(MemberFact(1, base, recorded, FINISHED))
            else:
                seed = seed_of(kind, number, recorded)
                planned.append(MemberFact(number, f"member-{number}", seed))
        if tuple(planned) != facts.members or not is_ensemble(root):
            write_ensemble(replace(facts, members=tuple(planned)), root)
    return root


def seed_of(kind: str, number: int, recorded: int | None) -> int:
    """The seed of a member: the same in every process, and another one for each kind, number and
    recorded seed."""
    text = f"member {number} of {kind} of a run with seed {recorded}"
    return int.from_bytes(bytes.fromhex(digest(text))[:4], "little") >> 1


def waiting(root: Path) -> list[MemberFact]:
    """Members that are not made yet."""
    return [
        member
        for member in read_ensemble(root).members
        if member.state == PLANNED
        or (member.state == FINISHED and not (root / member.folder / layout.FACTS_FILE).is_file())
    ]


def note(root: Path, number: int, state: str, reason: str = "") -> None:
    """Note what became of a member."""
    with _noting(root):
        facts = read_ensemble(root)
        members = [
            replace(member, state=state, reason=reason) if member.number == number else member
            for member in facts.members
        ]
        write_ensemble(replace(facts, members=tuple(members)), root)


def judge(root: Path, number: int) -> None:
    """Note a member whose run has ended as finished, or as diverged.

    Raises:
        TrajectoryNotFoundError: nothing was recorded.
        ValueError: it is the same run as another member: the seed does not reach its training.
    """
    facts = read_ensemble(root)
    own = Trajectory.load(root / facts.members[number - 1].folder)
    last = own.checkpoints[own.last_step]
    for name, tensor in {**last.parameters, **last.buffers}.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            note(root, number, DIVERGED, f"{name} is not finite at the end, step {own.last_step}")
            return
    for member in facts.members:
        if member.state != FINISHED or member.number == number:
            continue
        other = Trajectory.load(root / member.folder)
        if own.steps.loss.equal(other.steps.loss) and len(own.steps):
            raise ValueError(
                f"Member {number} of {root} is the same run as member {member.number}: every loss "
                "is equal, so the ensemble's spread would be too small. Members need something "
                "that their seed decides: initial weights, the order of batches, or noise."
                + (" Forks may leave earlier: at." if facts.kind == "forks" else "")
            )
    note(root, number, FINISHED)


@contextmanager
def diverging(root: Path, number: int) -> Iterator[None]:
    """A training that ends by a number that is not finite makes the member a diverged one, and so
    does an error after a loss that was not."""
    try:
        yield
    except NonFiniteError as error:
        note(root, number, DIVERGED, str(error))
    except Exception as error:
        if (step := _first_infinite_loss(root, number)) is None:
            raise
        note(root, number, DIVERGED, f"the loss of step {step} is not finite, and then: {error}")


def _first_infinite_loss(root: Path, number: int) -> int | None:
    """The step of a member's first loss that is not finite, as far as it was recorded."""
    folder = root / read_ensemble(root).members[number - 1].folder
    try:
        lost = (~Trajectory.load(folder).steps.loss.isfinite()).nonzero()
    except TrajectoryError:
        return None
    return int(lost[0]) + 1 if len(lost) else None


def recording_bytes(run: str | os.PathLike[str]) -> int:
    """Bytes of a run's recording, without what was computed from it."""
    root = Path(run)
    files = [
        root / layout.FACTS_FILE,
        *(file for _, _, file in layout.steps_files(root)),
        *layout.checkpoint_files(root).values(),
        *layout.statistics_files(root).values(),
    ]
    return sum(file.stat().st_size for file in files)


def require_room(root: Path, members: Sequence[MemberFact], sizes: Sequence[int]) -> None:
    """Refuse a disk without room for ``members`` of so many bytes, before the first is trained.

    Raises:
        OSError: says how much they take and how much there is.
    """
    free = shutil.disk_usage(root).free
    # What a member that was cut off takes is given back as it is replaced.
    begun = sum(
        file.stat().st_size
        for member in members
        for file in (root / member.folder).rglob("*.h5")
        if file.stat().st_nlink == 1
    )
    if sum(sizes) > free + begun:
        raise OSError(
            f"{len(members)} members of up to {readable_bytes(max(sizes))} take "
            f"{readable_bytes(sum(sizes))}, and the disk of {root} has "
            f"{readable_bytes(free)} left. Make room, or ask for fewer members."
        )


def _seed(settings: Mapping[str, object]) -> int | None:
    """The seed of a recorded run, if it is known."""
    seed = settings.get("seed")
    return int(seed) if isinstance(seed, str | int) and str(seed).isdecimal() else None


@contextmanager
def _noting(root: Path) -> Iterator[None]:
    """While it lasts, no other process changes the ensemble's file."""
    make_folder(root)
    lock, began = FolderLock(root), time.monotonic()
    while True:
        try:
            lock.acquire()
            break
        except TrajectoryLockedError:
            if time.monotonic() - began > _PATIENCE:
                raise
            time.sleep(0.05)
    try:
        for file in root.iterdir():
            # Left behind by a process that was killed while it wrote.
            if file.name.endswith(".part"):
                with suppress(OSError):
                    file.unlink()
        yield
    finally:
        lock.release()
