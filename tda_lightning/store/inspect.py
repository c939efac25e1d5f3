"""What is in a trajectory's folder, is it whole, how big is it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tda_lightning.records.errors import TrajectoryError
from tda_lightning.records.trajectory import Facts, Steps
from tda_lightning.store import layout
from tda_lightning.store.reader import (
    CheckpointFolder,
    read_facts,
    read_recorded_steps,
    require_trajectory,
)
from tda_lightning.store.statistics_folder import StatisticsFolder
from tda_lightning.store.tensor_cache import TensorCache


@dataclass(frozen=True)
class FileEntry:
    """One file of a trajectory: what it holds and its bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Description:
    """The content of a trajectory's folder. It is whole when ``problems`` is empty."""

    path: str
    facts: Facts
    steps: Steps | None  # None when they are damaged
    checkpoints: dict[int, FileEntry]
    statistics: dict[tuple[int, int], FileEntry]
    curvature: tuple[FileEntry, ...]
    unfinished: tuple[FileEntry, ...]
    features: tuple[FileEntry, ...]
    scores: tuple[FileEntry, ...]
    ground_truth: tuple[FileEntry, ...]
    size: int
    problems: tuple[str, ...]

    @property
    def planned_end(self) -> int | None:
        """The step of the last checkpoint that the run planned and did not reach, else None."""
        planned = self.facts.settings.get("planned_checkpoints")
        steps = [step for step in planned if _is_step(step)] if isinstance(planned, list) else []
        last = max(steps, default=0)
        return last if last > max(self.checkpoints, default=0) else None


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
    checkpoints, contents = CheckpointFolder(root, facts), {}
    for step in checkpoints:
        try:
            kept = checkpoints[step].optimizer is not None
            contents[step] = "weights and optimizer" if kept else "weights"
        except (TrajectoryError, OSError) as error:
            contents[step] = "damaged"
            problems.append(str(error))
    steps = None
    try:
        checkpoints.require_readable()
        steps = read_recorded_steps(root, facts, max(checkpoints))
    except (TrajectoryError, OSError) as error:
        problems.append(str(error))
    statistics = _statistics(root, facts, list(checkpoints), problems)
    for folder in (TensorCache(root, kind) for kind in layout.CACHE_FOLDERS):
        for key in folder:
            try:
                folder[key]
            except (TrajectoryError, OSError) as error:
                problems.append(str(error))
    problems.extend(
        f"{file} is unfinished: a process was stopped while it wrote. It is not read and can be "
        "deleted."
        for file in sorted(root.rglob("*.part"))
    )
    files = layout.checkpoint_files(root)
    return Description(
        path=str(root),
        facts=facts,
        steps=steps,
        checkpoints={step: _entry(contents[step], file) for step, file in files.items()},
        statistics=statistics,
        curvature=_kept(root, layout.CURVATURE_FOLDER),
        unfinished=_kept(root, layout.UNFINISHED_FOLDER),
        features=_kept(root, layout.FEATURES_FOLDER),
        scores=tuple(_entry(file.name, file) for file in layout.scores_files(root)),
        ground_truth=tuple(_entry(file.name, file) for file in layout.ground_truth_files(root)),
        size=sum(file.stat().st_size for file in root.rglob("*") if file.is_file()),
        problems=tuple(dict.fromkeys(problems)),
    )


def _kept(root: Path, kind: str) -> tuple[FileEntry, ...]:
    return tuple(_entry(key, file) for key, file in layout.cache_files(root, kind).items())


def _statistics(
    root: Path, facts: Facts, steps: list[int], problems: list[str]
) -> dict[tuple[int, int], FileEntry]:
    """The statistics by interval; what is wrong with them goes to ``problems``."""
    folder = StatisticsFolder(root, max(steps, default=0))
    found: dict[tuple[int, int], FileEntry] = {}
    files = layout.statistics_files(root)
    try:
        intervals = list(folder)
    except (TrajectoryError, OSError) as error:
        problems.append(str(error))
        return {interval: _entry("damaged", file) for interval, file in files.items()}
    for interval in intervals:
        try:
            blocks = folder[interval]
            examples = max((float(block.examples) for block in blocks.values()), default=0.0)
            content = f"{examples:.0f} examples, {len(blocks)} blocks"
        except (TrajectoryError, OSError) as error:
            content = "damaged"
            problems.append(str(error))
        found[interval] = _entry(content, files[interval])
    missing = sorted(set(steps) - {0, *(stop for _, stop in found)})
    if missing and facts.settings.get("curvature") is not None:
        problems.append(
            f"{root / layout.STATISTICS_FOLDER} is incomplete: expected statistics up to each "
            f"checkpoint, got none up to {missing[:10]}. Restore the missing files, or attribute "
            "with statistics='fitted'."
        )
    return found


def _entry(name: str, file: Path) -> FileEntry:
    return FileEntry(name, file.stat().st_size)
