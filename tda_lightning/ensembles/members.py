"""Members that a user's own script trains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tda_lightning.ensembles.folder import begin, diverging, judge, waiting
from tda_lightning.ensembles.recorder import MemberRecorder
from tda_lightning.ensembles.seeds import KIND, seeded
from tda_lightning.records.ensemble import FINISHED
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.store.ensemble_file import read_ensemble


@dataclass(frozen=True)
class Member:
    """A member that is being trained.

    Attributes:
        number: counted from 1, which is the recorded run.
        seed: its own; everything global is seeded with it already.
        folder: to record to.
        run: the recorded run.
    """

    number: int
    seed: int
    folder: Path
    run: Trajectory

    def recorder(self) -> MemberRecorder:
        """A recorder into the member's folder, with checkpoints as the recorded run has them. It
        resumes with the training (``ckpt_path``), and otherwise starts anew."""
        return MemberRecorder(self.folder, self.run)


@contextmanager
def member(run: str | os.PathLike[str], number: int) -> Iterator[Member]:
    """Train a member of kind ``seeds`` within, by a script of one's own.

    Everything global is seeded, and put back at the end. If the training ends well, the member is
    noted as finished (or as diverged).

    Args:
        run: folder of the recorded run.
        number: of the member, from 2.

    Raises:
        ValueError: the member is finished already, or is the same run as another one.
        TrajectoryNotFoundError: nothing was recorded into the member's folder.

    Example:
        >>> from tda_lightning import ensembles
        >>> for number in ensembles.unfinished("runs/fashion", members=5):  # doctest: +SKIP
        ...     with ensembles.member("runs/fashion", number) as own:
        ...         Trainer(max_epochs=4, callbacks=[own.recorder()]).fit(Net(), Data(own.seed))
    """
    if number < 2:
        raise ValueError(
            f"Member 1 is the recorded run itself: number must be from 2, got {number}."
        )
    root = begin(run, KIND, number)
    fact = read_ensemble(root).members[number - 1]
    folder = root / fact.folder
    if fact.state == FINISHED and fact not in waiting(root):
        raise ValueError(
            f"Member {number} is finished: {folder}. Ask ensembles.unfinished() which are not, or "
            "delete its folder."
        )
    assert fact.seed is not None
    with seeded(fact.seed), diverging(root, number):
        yield Member(number, fact.seed, folder, Trajectory.load(run))
        judge(root, number)


def unfinished(run: str | os.PathLike[str], members: int = 5) -> list[int]:
    """Numbers of the members of kind ``seeds`` that are still to be trained, so that with the
    recorded run there are ``members`` in all; plans them."""
    return [fact.number for fact in waiting(begin(run, KIND, members))]
