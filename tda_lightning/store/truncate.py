"""Cuts a recorded trajectory back to the step from which its training is resumed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from tda_lightning.records.errors import ResumeError
from tda_lightning.records.trajectory import Facts
from tda_lightning.store import layout
from tda_lightning.store.atomic_write import make_folder, sync_folder
from tda_lightning.store.reader import read_recorded_steps, steps_chain
from tda_lightning.store.steps_file import write_steps


def truncate_trajectory(root: Path, facts: Facts, rows: int, checkpoints: Collection[int]) -> None:
    """Leave the first ``rows`` steps and the ``checkpoints`` in ``root``, and remove the rest.

    A kill in the midst of it leaves a readable trajectory that can be cut again: a reader looks
    at no steps or statistics beyond the last checkpoint, so checkpoints go first, the last one
    before the others; and a file of steps that is cut in two goes after its first part has been
    written.

    Raises:
        ResumeError: steps, checkpoints or statistics that should stay are not there.
    """
    files, statistics = layout.checkpoint_files(root), layout.statistics_files(root)
    chain = steps_chain(root, rows)
    covered = chain[-1][1] if chain else 0
    if missing := sorted(set(checkpoints) - files.keys()):
        raise ResumeError(
            f"The trajectory in {root} cannot be continued: expected checkpoints at steps "
            f"{sorted(checkpoints)}, as when the Lightning checkpoint was saved, got "
            f"{list(files)}; {missing} are missing. {ADVICE}"
        )
    if covered < rows:
        raise ResumeError(
            f"The trajectory in {root} cannot be continued: expected the steps 1 to {rows}, as "
            f"when the Lightning checkpoint was saved, got 1 to {covered}. {ADVICE}"
        )
    gathered = {0, *(stop for _, stop in statistics)}
    lost = sorted(set(checkpoints) - gathered) if "curvature" in facts.settings else []
    if lost:
        raise ResumeError(
            f"The trajectory in {root} cannot be continued: expected curvature statistics up to "
            f"each checkpoint, got none up to {lost}. {ADVICE}"
        )
    # What was kept may be of checkpoints which are about to be made again.
    for kind in layout.CACHE_FOLDERS:
        _remove(layout.cache_files(root, kind).values())
    _remove(files[step] for step in sorted(files.keys() - set(checkpoints), reverse=True))
    _remove(path for (_, stop), path in statistics.items() if stop not in set(checkpoints))
    kept = {path for _, _, path in chain}
    if covered > rows:
        kept = {write_steps(root, 1, read_recorded_steps(root, facts, rows))}
    _remove(path for _, _, path in layout.steps_files(root) if path not in kept)
    remove_unfinished(root)
    # A run without steps yet was killed before its first; its folders must be there to go on.
    for folder in (layout.STEPS_FOLDER, layout.CHECKPOINTS_FOLDER):
        make_folder(root / folder)


ADVICE = (
    "Restore the folder as it was, resume from another Lightning checkpoint, or train from the "
    "start into another folder."
)


def remove_unfinished(root: Path) -> None:
    """Remove what a killed process had not renamed into place yet."""
    written = (layout.STEPS_FOLDER, layout.CHECKPOINTS_FOLDER, layout.STATISTICS_FOLDER)
    for folder in (root, *(root / name for name in written)):
        _remove(sorted(folder.glob("*.h5.part")))


def _remove(paths: Iterable[Path]) -> None:
    folders = set()
    for path in paths:
        path.unlink()
        folders.add(path.parent)
    for folder in folders:
        sync_folder(folder)
