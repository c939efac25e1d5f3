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

ADVICE = (
    "Restore the folder as it was, resume from another Lightning checkpoint, or train from the "
    "start into another folder."
)


def truncate_trajectory(root: Path, facts: Facts, rows: int, checkpoints: Collection[int]) -> None:
    """Leave the first ``rows`` steps and the ``checkpoints`` in ``root``, and remove the rest.

    A process killed in the middle leaves a readable trajectory that can be truncated again. A
    reader ignores steps and statistics beyond the last checkpoint, so checkpoints are removed
    first, the last one before the others. A file of steps that is split is removed after its first
    part has been written.

    Raises:
        ResumeError: steps, checkpoints or statistics that should stay are not there.
    """
    files, statistics = layout.checkpoint_files(root), layout.statistics_files(root)
    chain = steps_chain(root, rows)
    covered = chain[-1][1] if chain else 0
    if missing := sorted(set(checkpoints) - files.keys()):
        raise _refusal(
            root,
            f"expected checkpoints at steps {sorted(checkpoints)}, as when the Lightning "
            f"checkpoint was saved, got {list(files)}; {missing} are missing",
        )
    if covered < rows:
        raise _refusal(
            root,
            f"expected the steps 1 to {rows}, as when the Lightning checkpoint was saved, got 1 "
            f"to {covered}",
        )
    gathered = {0, *(stop for _, stop in statistics)}
    lost = sorted(set(checkpoints) - gathered) if "curvature" in facts.settings else []
    if lost:
        raise _refusal(
            root, f"expected curvature statistics up to each checkpoint, got none up to {lost}"
        )
    # Cached tensors may be those of checkpoints that are about to be made again.
    for kind in layout.CACHES:
        _remove(layout.cache_files(root, kind).values())
    _remove(files[step] for step in sorted(files.keys() - set(checkpoints), reverse=True))
    _remove(path for (_, stop), path in statistics.items() if stop not in set(checkpoints))
    staying = {path for _, _, path in chain}
    if covered > rows:
        staying = {write_steps(root, 1, read_recorded_steps(root, facts, rows))}
    _remove(path for _, _, path in layout.steps_files(root) if path not in staying)
    remove_unfinished(root)
    # A run without steps was killed before its first one; its folders must be there to go on.
    for folder in (layout.STEPS_FOLDER, layout.CHECKPOINTS_FOLDER):
        make_folder(root / folder)


def remove_unfinished(root: Path) -> None:
    """Remove files that a killed recorder had not renamed into place yet."""
    recorded = (layout.STEPS_FOLDER, layout.CHECKPOINTS_FOLDER, layout.STATISTICS_FOLDER)
    for folder in (root, *(root / name for name in recorded)):
        _remove(sorted(folder.glob("*.h5*.part")))


def _refusal(root: Path, reason: str) -> ResumeError:
    return ResumeError(f"The trajectory in {root} cannot be continued: {reason}. {ADVICE}")


def _remove(paths: Iterable[Path]) -> None:
    folders = set()
    for path in paths:
        path.unlink()
        folders.add(path.parent)
    for folder in folders:
        sync_folder(folder)
