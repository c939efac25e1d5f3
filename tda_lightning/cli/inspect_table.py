"""The content of a trajectory's folder as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from tda_lightning.records.ensemble import EnsembleFacts
from tda_lightning.runtime.formatting import readable_bytes
from tda_lightning.store.inspect import Description, FileEntry

_KINDS = {"what_if": "what-if run", "ground_truth": "ground truth"}
_MOST_ROWS = 24  # for the files of one kind; of more, the first and the last are shown


def description_table(description: Description) -> RenderableType:
    """What :func:`describe` found, as tables for a terminal."""
    run = Table("", "", title=f"Trajectory {_shown(description.path)}", show_header=False)
    for name, value in _run_rows(description):
        run.add_row(name, _shown(value))
    whole = "[green]yes[/green]" if not description.problems else "[red]no[/red]"
    run.add_row("whole", whole)
    if description.planned_end is not None:
        run.add_row(
            "interrupted", f"ended before its last planned checkpoint, {description.planned_end}"
        )
    files = Table("file", "content", "size", title="Files")
    files.columns[-1].justify = "right"
    for kind, content, size in _file_rows(description):
        files.add_row(kind, _shown(content), size)
    return Group(run, files, *(f"[red]{_shown(problem)}[/red]" for problem in description.problems))


def ensemble_table(root: Path, facts: EnsembleFacts) -> RenderableType:
    """An ensemble's members, as a table for a terminal."""
    settings = "".join(f", {name} {value}" for name, value in facts.settings.items())
    title = f"Ensemble {_shown(str(root))}: {facts.kind}{_shown(settings)}"
    table = Table("member", "folder", "seed", "state", title=title)
    for member in facts.members:
        seed = "unknown" if member.seed is None else str(member.seed)
        state = f"{member.state}: {member.reason}" if member.reason else member.state
        folder = "the recorded run" if member.folder == facts.run else member.folder
        table.add_row(str(member.number), _shown(folder), seed, _shown(state))
    return table


def _shown(text: str) -> str:
    """Text from a file, made safe for a terminal: no markup, no control characters."""
    return escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))


def _run_rows(description: Description) -> Iterable[tuple[str, str]]:
    facts, steps, settings = description.facts, description.steps, description.facts.settings
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
        yield "curvature", _online_curvature(settings["curvature"])
    hashed = len(facts.fingerprint) - 1 if facts.fingerprint else 0  # one entry is the length
    yield "fingerprint", f"{hashed} examples" if facts.fingerprint else "none"
    for name in ("precision", "accumulate_grad_batches", "gradient_clip_val", "seed", "created"):
        if settings.get(name) is not None:
            yield name.replace("_", " "), str(settings[name])
    versions = settings.get("versions")
    named = versions.items() if isinstance(versions, dict) else ()
    yield "versions", ", ".join(f"{package} {number}" for package, number in named)
    yield "size", readable_bytes(description.size)


def _online_curvature(curvature: object) -> str:
    """Settings of the curvature gathered during training, in words."""
    if not isinstance(curvature, dict):
        return str(curvature)
    fisher = str(curvature.get("fisher")).removesuffix(" (in training)")
    return f"online, every {curvature.get('every')} steps, {fisher} Fisher"


def _file_rows(description: Description) -> Iterable[tuple[str, str, str]]:
    steps, intervals = description.checkpoints, description.statistics
    checkpoints = [(f"checkpoint {step}", steps[step]) for step in steps]
    statistics = [(f"statistics {a}-{b}", intervals[a, b]) for a, b in intervals]
    yield from _abridged(checkpoints, "checkpoints")
    yield from _abridged(statistics, "statistics")
    for kind in ("curvature", "unfinished", "features", "what_if", "scores", "ground_truth"):
        for entry in getattr(description, kind):
            yield _KINDS.get(kind, kind), entry.name, readable_bytes(entry.size)


def _abridged(entries: list[tuple[str, FileEntry]], kind: str) -> Iterable[tuple[str, str, str]]:
    """Rows of all entries, or of the first and the last."""
    half = _MOST_ROWS // 2
    hidden = entries[half:-half] if len(entries) > _MOST_ROWS else []
    for position, (title, entry) in enumerate(entries):
        if not half <= position < half + len(hidden):
            yield title, entry.name, readable_bytes(entry.size)
        elif position == half:
            size = sum(entry.size for _, entry in hidden)
            yield f"{len(hidden)} more {kind}", "", readable_bytes(size)


def _range(values: np.ndarray) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
