"""What a trajectory's folder holds, whether it is whole, and how big it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tda_lightning.records.errors import TrajectoryError
from tda_lightning.records.trajectory import Facts
from tda_lightning.store import layout
from tda_lightning.store.reader import (
    CheckpointFolder,
    read_facts,
    read_recorded_steps,
    require_trajectory,
)
from tda_lightning.store.statistics_folder import StatisticsFolder
from tda_lightning.store.step_arrays import StepArrays
from tda_lightning.store.tensor_cache import TensorCache

_DAMAGED = "damaged"


@dataclass(frozen=True)
class FileEntry:
    """One file of a trajectory: what it holds, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Description:
    """The content of a trajectory's folder. It is whole when ``problems`` is empty."""

    path: str
    facts: Facts
    steps: StepArrays | None  # None when they are damaged
    checkpoints: dict[int, FileEntry]
    statistics: dict[tuple[int, int], FileEntry]
    curvature: tuple[FileEntry, ...]
    unfinished: tuple[FileEntry, ...]
    features: tuple[FileEntry, ...]
    what_if: tuple[FileEntry, ...]
    scores: tuple[FileEntry, ...]
    ground_truth: tuple[FileEntry, ...]
    size: int
    problems: tuple[str, ...]

    @property
    def planned_end(self) -> int | None:
        """The last checkpoint that the run planned, if it never got there; else None."""
        planned = self.facts.settings.get("planned_checkpoints")
        steps = [step for step in planned if type(step) is int] if isinstance(planned, list) else []
        last = max(steps, default=0)
        return last if last > max(self.checkpoints, default=0) else None


def describe(path: str | Path) -> Description:
    """Read everything in the trajectory at ``path``, checksums included.

    Raises:
        TrajectoryNotFoundError: there is no trajectory.
        TrajectoryFormatError: its facts cannot be read; other damage is among ``problems``.
    """
    root = Path(path)
    require_trajectory(root)
    facts = read_facts(root)
    problems: list[str] = []
    folder, checkpoints = CheckpointFolder(root, facts), {}
    for step, file in layout.checkpoint_files(root).items():
        content = _DAMAGED
        with _noting(problems):
            content = "weights and optimizer" if folder.check(step) else "weights"
        checkpoints[step] = _entry(content, file)
    steps = None
    with _noting(problems):
        folder.require_readable()
        steps = read_recorded_steps(root, facts, max(folder))
    statistics = _statistics(root, facts, list(checkpoints), problems)
    for kind in layout.CACHES:
        cache = TensorCache(root, kind)
        for key in cache:
            with _noting(problems):
                cache.check(key)
    problems.extend(
        f"{file} is unfinished: a process was stopped while it wrote. It is not read and can be "
        "deleted."
        for file in sorted(root.rglob("*.part"))
    )
    curvature, unfinished, features = (
        tuple(_entry(key, file) for key, file in layout.cache_files(root, kind).items())
        for kind in layout.CACHES
    )
    return Description(
        path=str(root),
        facts=facts,
        steps=steps,
        checkpoints=checkpoints,
        statistics=statistics,
        curvature=curvature,
        unfinished=unfinished,
        features=features,
        what_if=tuple(_what_if(folder, problems) for folder in layout.what_if_folders(root)),
        scores=tuple(_entry(file.name, file) for file in layout.scores_files(root)),
        ground_truth=tuple(_entry(file.name, file) for file in layout.ground_truth_files(root)),
        size=sum(file.stat().st_size for file in root.rglob("*") if file.is_file()),
        problems=tuple(dict.fromkeys(problems)),
    )


def _statistics(
    root: Path, facts: Facts, steps: list[int], problems: list[str]
) -> dict[tuple[int, int], FileEntry]:
    """The statistics by interval; what is wrong with them is added to ``problems``."""
    folder = StatisticsFolder(root, max(steps, default=0))
    files = layout.statistics_files(root)
    try:
        intervals = list(folder)
    except (TrajectoryError, OSError) as error:
        problems.append(str(error))
        return {interval: _entry(_DAMAGED, file) for interval, file in files.items()}
    entries: dict[tuple[int, int], FileEntry] = {}
    for interval in intervals:
        content = _DAMAGED
        with _noting(problems):
            examples, blocks = folder.check(interval)
            content = f"{examples:.0f} examples, {blocks} blocks"
        entries[interval] = _entry(content, files[interval])
    missing = sorted(set(steps) - {0, *(stop for _, stop in entries)})
    if missing and facts.settings.get("curvature") is not None:
        problems.append(
            f"{root / layout.STATISTICS_FOLDER} is incomplete: expected statistics up to each "
            f"checkpoint, got none up to {missing[:10]}. Restore the missing files, or attribute "
            "with statistics='fitted'."
        )
    return entries


def _what_if(folder: Path, problems: list[str]) -> FileEntry:
    """A what-if run: its weights in words, and its size."""
    name = _DAMAGED
    with _noting(problems):
        made = describe(folder)
        problems.extend(made.problems)
        name = str(made.facts.settings.get("what_if", ""))
        if made.planned_end is not None:
            name += f", interrupted at step {max(made.checkpoints, default=0)}"
    return FileEntry(name, sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Adds an error to ``problems`` instead of raising it."""
    try:
        yield
    except (TrajectoryError, OSError) as error:
        problems.append(str(error))


def _entry(name: str, file: Path) -> FileEntry:
    return FileEntry(name, file.stat().st_size)
