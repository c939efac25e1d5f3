"""The provenance of scores as rows of a table.

What has another form than ``tda_lightning.records.provenance`` gives it is shown as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from tda_lightning.records.provenance import Provenance
from tda_lightning.records.scores import Scores
from tda_lightning.report.kept import shorten

_FIRST = ("estimator", "curvature", "fisher", "trajectory", "task", "segments", "created")
_LAST = ("versions", "command", "config")
_SHOWN_ELSEWHERE = ("notes", "predictions", "measurements", "query_indices")


def rows(scores: Scores, provenance: Provenance) -> list[tuple[str, str, bool]]:
    """Name, text, and whether the text is long, the most interesting first.

    Args:
        scores: whose raw provenance is shown.
        provenance: the part of it that has the agreed form.
    """
    raw: Mapping[str, object] = scores.provenance
    apart = [name for name in _SHOWN_ELSEWHERE if name in provenance]
    middle = [name for name in raw if name not in (*_FIRST, *_LAST, *apart)]
    table = []
    for name in (*_FIRST, *middle, *_LAST):
        value = raw.get(name)
        if value is None or value == "":
            continue
        text = one_line(value)
        long = len(text) > 160
        if long and isinstance(value, dict | list):
            text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        table.append((str(name), shorten(text, 6000), long))
    return table


def one_line(value: object) -> str:
    """A nested value as a person would write it.

    Example:
        >>> one_line({"segments": [[0, 8], [8, 16]], "damping": 0.1})
        'segments 0–8, 8–16, damping 0.1'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one_line(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(
            "–".join(map(one_line, entry)) if isinstance(entry, list | tuple) else one_line(entry)
            for entry in value
        )
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def query_indices(scores: Scores, provenance: Provenance) -> list[int]:
    """Positions of the queries in their data set."""
    indices = provenance.get("query_indices", [])
    return indices if len(indices) == scores.num_queries else list(range(scores.num_queries))


def segment_bounds(scores: Scores, provenance: Provenance) -> list[list[int]] | None:
    """First and last step of each segment; None where they are unknown."""
    bounds = provenance.get("segments")
    if scores.by_segment is None or bounds is None or len(bounds) != len(scores.by_segment):
        return None
    return bounds


def segment_names(scores: Scores, provenance: Provenance) -> list[str]:
    """The steps of each segment, or its number; empty without segments."""
    if (bounds := segment_bounds(scores, provenance)) is not None:
        return [f"{start}–{stop}" for start, stop in bounds]
    count = 0 if scores.by_segment is None else len(scores.by_segment)
    return [f"segment {place}" for place in range(1, count + 1)]
