"""Make the members of an ensemble that are not made yet, whatever their kind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tda_lightning.ensembles.folder import require_room, waiting
from tda_lightning.records.ensemble import DIVERGED, Ensemble, MemberFact
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.store.ensemble_file import read_ensemble


def make_waiting(
    root: Path,
    title: str,
    size: Callable[[MemberFact], int],
    make: Callable[[MemberFact], None],
) -> Ensemble:
    """Make every member that is waiting, and name those that diverged.

    Args:
        root: the ensemble's folder.
        title: of the progress bar.
        size: bytes that a member will take.
        make: makes one and notes what became of it.

    Raises:
        OSError: the disk has no room for them.
    """
    missing = waiting(root)
    require_room(root, missing, [size(member) for member in missing])
    with SlowProgress(title, len(missing)) as progress:
        for member in missing:
            make(member)
            progress.advance()
    for line in diverged(root):
        say(line)
    return Ensemble.load(root)


def diverged(root: Path) -> list[str]:
    """A sentence about each member that diverged."""
    return [
        f"Member {member.number} (seed {member.seed}) diverged and is left out: {member.reason}"
        for member in read_ensemble(root).members
        if member.state == DIVERGED
    ]


def say(line: str) -> None:
    """To the user, beside what the caller prints."""
    print(line, file=sys.stderr)
