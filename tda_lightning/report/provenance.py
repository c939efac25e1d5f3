"""What the provenance of scores says, in words.

A scores file may come from anywhere: what does not have the agreed form is left out or shown as
it stands, never an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tda_lightning.records.scores import Scores
from tda_lightning.report.examples import shorten

_FIRST = ("estimator", "curvature", "fisher", "order", "trajectory", "task", "segments", "created")
_LAST = ("versions", "command", "config")
_ELSEWHERE = ("notes", "predictions", "measurements", "query_indices")


def per_query(scores: Scores, name: str) -> list[Any] | None:
    """The provenance's list ``name`` if it has one entry for each query."""
    values: Any = scores.provenance.get(name)
    fits = isinstance(values, list) and len(values) == scores.num_queries
    return values if fits else None


def query_indices(scores: Scores) -> list[int]:
    """Positions of the queries in their data set."""
    indices = per_query(scores, "query_indices") or []
    if not indices or not all(isinstance(index, int) and index >= 0 for index in indices):
        return list(range(scores.num_queries))
    return indices


def segment_bounds(scores: Scores) -> list[tuple[float, float]] | None:
    """First and last step of each segment, where the provenance says so in the agreed form."""
    if scores.by_segment is None:
        return None
    bounds = scores.provenance.get("segments")
    if not isinstance(bounds, list) or len(bounds) != len(scores.by_segment):
        return None
    try:
        return [(float(start), float(stop)) for start, stop in bounds]
    except (TypeError, ValueError):
        return None


def segment_names(scores: Scores) -> list[str]:
    """The steps of each segment, or its number; empty without segments."""
    bounds = segment_bounds(scores)
    if bounds is not None:
        return [f"{start:g}–{stop:g}" for start, stop in bounds]
    count = 0 if scores.by_segment is None else len(scores.by_segment)
    return [f"segment {place}" for place in range(1, count + 1)]


def entries(provenance: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Name, text, and whether the text is long, in the order of interest."""
    middle = [name for name in provenance if name not in (*_FIRST, *_LAST, *_ELSEWHERE)]
    rows = []
    for name in (*_FIRST, *middle, *_LAST):
        value = provenance.get(name)
        if value is None or value == "":
            continue
        text = one_line(value)
        long = len(text) > 160
        if long and isinstance(value, dict | list):
            text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        rows.append((str(name), shorten(text, 6000), long))
    return rows


def short_name(value: Any) -> Any:
    """The name of what a configuration describes, else the whole of it."""
    if isinstance(value, Mapping):
        name = value.get("name") or value.get("_target_") or value.get("class")
        return str(name).rpartition(".")[2] if name else value
    return value


def one_line(value: Any) -> str:
    """A nested value as a reader would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one_line(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(
            "–".join(map(one_line, entry)) if isinstance(entry, list | tuple) else one_line(entry)
            for entry in value
        )
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def notes(provenance: Mapping[str, Any]) -> list[str]:
    """Remarks of the attribution, one text each."""
    value = provenance.get("notes") or []
    return [str(note) for note in value] if isinstance(value, list | tuple) else [str(value)]
