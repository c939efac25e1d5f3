"""Writes the report: collects what the page shows, and fills the template with it.

Scores, data, provenance and file names are foreign text: the template escapes all of it, and the
page's own policy forbids it to run or to load anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tda_lightning.report.charts import Chart, bar_chart, line_chart, number
from tda_lightning.report.examples import Example, Listing, arrange, example, listing, shorten
from tda_lightning.report.rendered import DatasetRenderer, Renderer
from tda_lightning.scores import Scores
from tda_lightning.trajectory import Trajectory

_FIRST = ("estimator", "curvature", "fisher", "order", "trajectory", "task", "segments", "created")
_LAST = ("versions", "command", "config")
_ELSEWHERE = ("notes", "predictions", "measurements", "query_indices")


@dataclass(frozen=True)
class QueryView:
    """What the page says about one query."""

    row: int
    shown: Listing  # the query itself, as a list of one
    prediction: str
    measurement: str
    totals: tuple[tuple[str, int, str, str], ...]  # kind, examples, their sum, share of those shown
    proponents: Listing
    opponents: Listing
    chart: Chart | None

    @property
    def example(self) -> Example:
        return self.shown.examples[0]


def write_report(
    scores: Scores,
    path: str | os.PathLike[str],
    *,
    train: Any = None,
    query: Any = None,
    render: Renderer | None = None,
    trajectory: Trajectory | None = None,
    predictions: Sequence[str] | None = None,
    queries: Sequence[int] | None = None,
    k: int = 8,
    num_suspects: int = 24,
    title: str = "Training data attribution",
) -> Path:
    """Write the scores as one HTML file that needs no network and no JavaScript.

    Without data sets and without ``render`` the examples are shown by their indices.

    Args:
        scores: any scores.
        path: of the file; an older report there is replaced.
        train: the training set, column n of the scores being its example n.
        query: the queries, in the order of the rows.
        render: how to show example ``index`` of ``split`` ("train" or "query"), as data modules
            offer it; guessed from the data sets when None.
        trajectory: the recorded run, for the curve of learning rates.
        predictions: what the model said about each query; by default
            ``scores.provenance["predictions"]``.
        queries: rows of the scores to show; by default the first 12.
        k: proponents, and opponents, shown for each query.
        num_suspects: length of the ranking by self-influence.
        title: heading of the page.

    Returns:
        The path of the file.
    """
    path = Path(path)
    _require_lengths(scores, train, query, predictions)
    if queries is None:
        queries = range(min(12, scores.num_queries))
    if any(not 0 <= row < scores.num_queries for row in queries):
        raise IndexError(
            f"queries must lie in 0 to {scores.num_queries - 1}, the rows of the scores; got "
            f"{list(queries)}."
        )
    if k < 1 or num_suspects < 1:
        raise ValueError(f"k and num_suspects must be positive, got {k} and {num_suspects}.")
    render = render or DatasetRenderer(train, query)
    names = _segment_names(scores)
    html = _environment().get_template("page.html.j2").render(
        title=title,
        scores=scores,
        estimator=_one_line(_named(scores.provenance.get("estimator", ""))),
        segment_names=names,
        queries=[_query(scores, row, render, predictions, k, names) for row in queries],
        suspects=_suspects(scores, render, num_suspects),
        self_influence=_self_influence_chart(scores),
        learning_rate=None if trajectory is None else _learning_rate_chart(scores, trajectory),
        provenance=_provenance(scores.provenance),
        notes=[str(note) for note in _as_list(scores.provenance.get("notes"))],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    # Text from data may hold what UTF-8 cannot: lone surrogates become question marks.
    part.write_bytes(html.replace("\0", "").encode("utf-8", "replace"))
    os.replace(part, path)
    return path


def _require_lengths(
    scores: Scores, train: Any, query: Any, predictions: Sequence[str] | None
) -> None:
    if hasattr(train, "__len__") and len(train) != scores.num_train:
        raise ValueError(
            f"The training set has {len(train)} examples, the scores have {scores.num_train} "
            "columns. Give the data set that was scored."
        )
    last = max(_query_indices(scores), default=-1)
    if hasattr(query, "__len__") and len(query) <= last:
        raise ValueError(
            f"The query set has {len(query)} examples, the scores are about query {last} and "
            "others. Give the data set that was scored."
        )
    if predictions is not None and len(predictions) != scores.num_queries:
        raise ValueError(
            f"predictions must hold one text for each of the {scores.num_queries} queries, got "
            f"{len(predictions)}."
        )


def _environment() -> Environment:
    # autoescape=True and not by file name: everything in this template is foreign text.
    environment = Environment(
        loader=PackageLoader("tda_lightning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment


def _query_indices(scores: Scores) -> list[int]:
    indices = scores.provenance.get("query_indices")
    return list(range(scores.num_queries)) if indices is None else list(indices)


def _query(
    scores: Scores,
    row: int,
    render: Renderer,
    predictions: Sequence[str] | None,
    k: int,
    names: Sequence[str],
) -> QueryView:
    k = min(k, scores.num_train)
    helped, harmed = scores.proponents(row, k), scores.opponents(row, k)
    # With few examples the tails overlap: each list keeps to its own sign.
    chosen = {
        "proponent": [index for index, value in zip(*map(list, helped), strict=True) if value > 0],
        "opponent": [index for index, value in zip(*map(list, harmed), strict=True) if value < 0],
    }
    values = scores.values[row]
    strongest = max(float(helped[1][0]), -float(harmed[1][0]), 0.0)
    lists, series, totals = {}, [], []
    for kind, entries in chosen.items():
        indices = [int(index) for index in entries]
        parts = None
        if scores.by_segment is not None and indices:
            block = scores.by_segment[:, row][:, indices]  # [segment, example]
            parts = block.T.tolist()
            series.append((f"{kind}s", kind, block.sum(1).tolist()))
        shown = values[indices]
        lists[kind] = listing(render, indices, shown.tolist(), kind, strongest, parts)
        alike = values[values > 0] if kind == "proponent" else values[values < 0]
        if len(alike):
            total = float(alike.double().sum())
            share = f"{float(shown.double().sum()) / total:.0%}"
            totals.append((kind, len(alike), number(total, signed=True), share))
    if predictions is None:
        predictions = scores.provenance.get("predictions")
    measurements = scores.provenance.get("measurements")
    return QueryView(
        row,
        arrange((example(render, "query", _query_indices(scores)[row], "large"),)),
        "" if predictions is None else shorten(str(predictions[row]), 200),
        "" if measurements is None else number(float(measurements[row])),
        tuple(totals),
        lists["proponent"],
        lists["opponent"],
        bar_chart(series, names) if series else None,
    )


def _suspects(scores: Scores, render: Renderer, count: int) -> Listing | None:
    if scores.self_influence is None:
        return None
    ordered, indices = scores.self_influence.sort(descending=True, stable=True)
    count = min(count, scores.num_train)
    values = ordered[:count].tolist()
    strongest = max(map(abs, values), default=0.0)
    return listing(render, indices[:count].tolist(), values, "suspect", strongest)


def _self_influence_chart(scores: Scores) -> Chart | None:
    if scores.self_influence is None or scores.num_train < 2:
        return None
    ordered = scores.self_influence.sort(descending=True).values.tolist()
    return line_chart([(range(1, len(ordered) + 1), ordered)], width=420, height=170)


def _learning_rate_chart(scores: Scores, trajectory: Trajectory) -> Chart:
    rates = trajectory.steps.learning_rate
    steps = range(1, len(rates) + 1)
    bands = [
        (start, stop, f"segment {number}")
        for number, (start, stop) in enumerate(_segments(scores) or [], start=1)
    ]
    marks = [(step, f"checkpoint at step {step}") for step in sorted(trajectory.checkpoints)]
    # Groups that share a schedule would hide each other.
    curves = list(dict.fromkeys(tuple(column) for column in rates.T.tolist()))
    return line_chart([(steps, curve) for curve in curves[:6]], bands, marks)


def _segments(scores: Scores) -> list[tuple[float, float]] | None:
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


def _segment_names(scores: Scores) -> list[str]:
    bounds = _segments(scores)
    if bounds is not None:
        return [f"{start:g}–{stop:g}" for start, stop in bounds]
    count = 0 if scores.by_segment is None else len(scores.by_segment)
    return [f"segment {number}" for number in range(1, count + 1)]


def _provenance(provenance: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Name, text, and whether the text is long, in the order of interest."""
    middle = [name for name in provenance if name not in (*_FIRST, *_LAST, *_ELSEWHERE)]
    entries = []
    for name in (*_FIRST, *middle, *_LAST):
        value = provenance.get(name)
        if value is None or value == "":
            continue
        text = _one_line(value)
        long = len(text) > 160
        if long and isinstance(value, dict | list):
            text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        entries.append((str(name), shorten(text, 6000), long))
    return entries


def _named(value: Any) -> Any:
    """The name of what a configuration describes, else the whole of it."""
    if isinstance(value, Mapping):
        name = value.get("name") or value.get("_target_") or value.get("class")
        return str(name).rpartition(".")[2] if name else value
    return value


def _one_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_one_line(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(
            "–".join(map(_one_line, entry)) if isinstance(entry, list | tuple) else _one_line(entry)
            for entry in value
        )
    return str(value)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
