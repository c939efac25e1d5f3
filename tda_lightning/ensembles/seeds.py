"""Members of kind ``seeds``: independent runs, with fresh weights and a fresh order of batches."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import seed_everything

from tda_lightning.ensembles.folder import (
    begin,
    diverging,
    judge,
    recording_bytes,
)
from tda_lightning.ensembles.making import make_waiting, say
from tda_lightning.ensembles.recorder import MemberRecorder
from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.ensemble import Ensemble, MemberFact
from tda_lightning.records.fresh_training import FreshTraining
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.store import layout
from tda_lightning.store.ensemble_file import read_ensemble

KIND = "seeds"
_SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


def train(
    run: str | os.PathLike[str], make: Callable[[int], FreshTraining], members: int = 5
) -> Ensemble:
    """Train further runs like a recorded one, so that with it there are ``members`` in all.

    They are kept in ``RUN/ensemble/seeds/member-2`` and so on. A member that is finished is not
    trained again, and one that was cut off starts anew. A member that diverges is named in a
    warning, and the others are kept.

    Args:
        run: folder of the recorded run.
        make: makes trainer, module and data from a seed, without a recorder. Everything global is
            seeded before it is called.
        members: number of runs, the recorded one included.

    Raises:
        OSError: the disk has no room for them.
        ValueError: fewer than two members, or runs that do not differ.

    Example:
        >>> from tda_lightning import ensembles
        >>> def make(seed):
        ...     return ensembles.FreshTraining(Trainer(max_epochs=4), Net(), Data(seed))
        >>> ensemble = ensembles.train("runs/fashion", make, members=5)  # doctest: +SKIP
    """
    root = begin(run, KIND, members)
    return make_waiting(
        root,
        "Training members",
        lambda _: recording_bytes(run),
        lambda member: train_member(root, member, make),
    )


def train_member(root: Path, member: MemberFact, make: Callable[[int], FreshTraining]) -> None:
    """Train one member and note what became of it."""
    folder, run = root / member.folder, Trajectory.load(root / read_ensemble(root).run)
    if (folder / layout.FACTS_FILE).is_file():
        say(f"Member {member.number} was cut off and starts anew: {folder}")
    assert member.seed is not None
    with seeded(member.seed), diverging(root, member.number):
        training = make(member.seed)
        if any(isinstance(one, TrajectoryRecorder) for one in training.trainer.callbacks):
            raise ValueError(
                "make(seed) gave a trainer with a TrajectoryRecorder, expected one without: each "
                "member is recorded into its own folder."
            )
        training.trainer.callbacks.append(MemberRecorder(folder, run))
        training.trainer.fit(training.module, datamodule=training.data)
        # Trainer, module and data reference each other: without this, they stay in memory.
        del training
        gc.collect()
        judge(root, member.number)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Everything global is seeded within, and put back as it was."""
    before = {name: os.environ.get(name) for name in _SEED_VARIABLES}
    with unchanged_randomness():
        try:
            seed_everything(seed, workers=True, verbose=False)
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
