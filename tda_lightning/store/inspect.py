"""What is in a trajectory's folder, is it whole, how big is it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from tda_lightning.records.errors import TrajectoryError
from tda_lightning.records.trajectory import Facts, Steps
from tda_lightning.store import layout
from tda_lightning.store.kept_folder import KeptFolder
from tda_lightning.store.reader import (
    CheckpointFolder,
    read_facts,
    read_recorded_steps,
    require_trajectory,
)
from tda_lightning.store.statistics_folder import StatisticsFolder

_SHOWN = 24  # files of a kind; of more, the first and the last are shown


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
    for folder in (KeptFolder(root, kind) for kind in layout.KEPT_FOLDERS):
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
    return tuple(_entry(key, file) for key, file in layout.kept_files(root, kind).items())


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


def inspect_table(path: str | Path) -> RenderableType:
    """The trajectory at ``path`` as tables for a terminal: the run, then its files."""
    return description_table(describe(path))


def description_table(found: Description) -> RenderableType:
    """What :func:`describe` found, as tables for a terminal."""
    run = Table("", "", title=f"Trajectory {_shown(found.path)}", show_header=False)
    for name, value in _run_rows(found):
        run.add_row(name, _shown(value))
    whole = "[green]yes[/green]" if not found.problems else "[red]no[/red]"
    run.add_row("whole", whole)
    if found.planned_end is not None:
        run.add_row("interrupted", f"ended before its last planned checkpoint, {found.planned_end}")
    files = Table("file", "content", "size", title="Files")
    files.columns[-1].justify = "right"
    for kind, content, size in _file_rows(found):
        files.add_row(kind, _shown(content), size)
    return Group(run, files, *(f"[red]{_shown(problem)}[/red]" for problem in found.problems))


def _shown(text: str) -> str:
    """Foreign text as it may stand in a terminal: without markup or control characters."""
    return escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))


def _run_rows(found: Description) -> Iterable[tuple[str, str]]:
    facts, steps, settings = found.facts, found.steps, found.facts.settings
    count = sum(math.prod(fact.shape) for fact in facts.parameters.values())
    yield "module", str(settings.get("module", "unknown"))
    yield "trained parameters", f"{count:,} in {len(facts.parameters)} tensors"
    yield "optimizer", facts.optimizer
    if len(facts.stages) > 1:
        yield "stages", f"{len(facts.stages)}, from steps {[s.start for s in facts.stages]}"
    if settings.get("skipped_steps"):
        yield "skipped steps", str(settings["skipped_steps"])
    yield "training examples", "unknown" if facts.num_examples is None else str(facts.num_examples)
    if steps is not None and len(steps):
        yield "steps", str(len(steps))
        yield "epochs", str(int(steps.epoch.max()) + 1)
        yield "learning rate", _range(steps.learning_rate)
        yield "loss", _range(steps.loss)
        yield "gradient norm", _range(steps.gradient_norm)
        if bool((clipped := steps.clipping != 1).any()):
            factors = _range(steps.clipping[clipped])
            yield "clipped", f"{int(clipped.sum())} steps, factor {factors}"
        yield "batches", f"{len(steps.example_offsets) - 1:,}"
    yield "example indices", str(settings.get("indices", "unknown"))
    random = str(settings.get("random", "unknown"))
    counted = (
        f"{random}, {len(steps.random)} jumps" if steps is not None and steps.random else random
    )
    yield "random states", counted
    if settings.get("curvature") is not None:
        yield "curvature", _gathered(settings["curvature"])
    hashed = len(facts.fingerprint) - 1 if facts.fingerprint else 0  # one entry is the length
    yield "fingerprint", f"{hashed} examples" if facts.fingerprint else "none"
    for name in ("precision", "accumulate_grad_batches", "gradient_clip_val", "seed", "created"):
        if settings.get(name) is not None:
            yield name.replace("_", " "), str(settings[name])
    versions = settings.get("versions")
    named = versions.items() if isinstance(versions, dict) else ()
    yield "versions", ", ".join(f"{package} {number}" for package, number in named)
    yield "size", _bytes(found.size)


def _gathered(curvature: object) -> str:
    """The settings of statistics in words."""
    if not isinstance(curvature, dict):
        return str(curvature)
    fisher = str(curvature.get("fisher")).removesuffix(" (in training)")
    return f"online, every {curvature.get('every')} steps, {fisher} Fisher"


def _file_rows(found: Description) -> Iterable[tuple[str, str, str]]:
    checkpoints = {f"checkpoint {step}": entry for step, entry in found.checkpoints.items()}
    yield from _abridged(checkpoints, "checkpoints")
    statistics = {
        f"statistics {start}-{stop}": entry for (start, stop), entry in found.statistics.items()
    }
    yield from _abridged(statistics, "statistics")
    for entry in found.curvature:
        yield "curvature", entry.name, _bytes(entry.size)
    for entry in found.unfinished:
        yield "unfinished", entry.name, _bytes(entry.size)
    for entry in found.features:
        yield "features", entry.name, _bytes(entry.size)
    for entry in found.scores:
        yield "scores", entry.name, _bytes(entry.size)
    for entry in found.ground_truth:
        yield "ground truth", entry.name, _bytes(entry.size)


def _abridged(entries: dict[str, FileEntry], kind: str) -> Iterable[tuple[str, str, str]]:
    """Rows of all entries, or of the first and the last."""
    titles, half = list(entries), _SHOWN // 2
    hidden = titles[half:-half] if len(titles) > _SHOWN else []
    for title in titles:
        if title in hidden[:1]:
            size = sum(entries[one].size for one in hidden)
            yield f"{len(hidden)} more {kind}", "", _bytes(size)
        if title not in hidden:
            yield title, entries[title].name, _bytes(entries[title].size)


def _entry(name: str, file: Path) -> FileEntry:
    return FileEntry(name, file.stat().st_size)


def _range(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _bytes(size: float) -> str:
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop()
    return f"{size:.0f} B" if units[-1] == "B" else f"{size:.1f} {units[-1]}"
