"""Writes the report: collects what the page shows and fills the template.

Scores, data, provenance and file names are untrusted text: the template escapes all of it, and the
page's own policy forbids running or loading anything.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch.utils.data import DataLoader

from tda_lightning.records.provenance import EditRecord, Provenance, well_formed
from tda_lightning.records.rendered import Rendered, Renderer
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.report.charts import Chart, bar_chart, line_chart, number
from tda_lightning.report.dataset_renderer import DatasetRenderer
from tda_lightning.report.examples import Example, Listing, arrange, example, listing, shorten
from tda_lightning.report.provenance_rows import (
    one_line,
    query_indices,
    rows,
    segment_bounds,
    segment_names,
)
from tda_lightning.report.statements import edit_in_words, relabelled, statements
from tda_lightning.report.wording import Wording, wording
from tda_lightning.store.atomic_write import replacing


@dataclass(frozen=True)
class QueryView:
    """What the page shows of one query."""

    row: int
    shown: Listing  # the query itself, as a list of one
    prediction: str
    measurement: str
    totals: tuple[tuple[str, int, str, str], ...]  # kind, examples, their sum, share shown below
    proponents: Listing
    opponents: Listing
    chart: Chart | None

    @property
    def example(self) -> Example:
        """The query itself."""
        return self.shown.examples[0]


def write_report(
    scores: Scores,
    path: str | os.PathLike[str],
    *,
    train: object = None,
    query: object = None,
    render: Renderer | None = None,
    trajectory: Trajectory | None = None,
    predictions: Sequence[str] | None = None,
    queries: Sequence[int] | None = None,
    k: int = 8,
    num_suspects: int = 24,
    pool: object = None,
    title: str = "Training data attribution",
) -> Path:
    """Write the scores as one HTML file that needs neither network nor JavaScript.

    Without data sets and without ``render``, examples are shown by their indices.

    Args:
        scores: any scores.
        path: the file to write; an older report there is replaced.
        train: the training set or a loader over it; column n of the scores is its example n.
        query: the queries or a loader over them, in the order of the rows.
        render: shows example ``index`` of ``split`` ("train" or "query"), as data modules do; by
            default it is guessed from the data sets.
        trajectory: the recorded run, for its learning-rate curve.
        predictions: what the model predicts for each query; by default
            ``scores.provenance["predictions"]``.
        queries: rows of the scores to show; by default the first 12.
        k: number of proponents, and of opponents, shown for each query.
        num_suspects: length of the ranking by self-influence.
        pool: the examples that were scored as additions: a data set, or a function that shows
            example ``index``.
        title: heading of the page.

    Returns:
        The path of the file.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        ValueError: data sets or predictions of another length than the scores.
        IndexError: there is no such query.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Give the name of the HTML file to write.")
    train, query = (
        data.dataset if isinstance(data, DataLoader) else data for data in (train, query)
    )
    provenance = well_formed(scores.provenance)
    _require_lengths(scores, provenance, train, query, predictions)
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
    if edits := provenance.get("edits"):
        render = _edited(render, edits, _pool_renderer(pool), provenance)
    words = wording(provenance)
    names = segment_names(scores, provenance)
    rates = None if trajectory is None else _learning_rate_chart(scores, provenance, trajectory)
    template = _environment().get_template("page.html.j2")
    html = template.render(
        title=title,
        scores=scores,
        estimator=provenance.get("estimator", ""),
        segment_names=names,
        queries=[
            _query(scores, provenance, row, render, predictions, k, names, words) for row in queries
        ],
        words=words,
        suspects=_suspects(scores, render, num_suspects),
        self_influence=_self_influence_chart(scores),
        learning_rate=rates,
        provenance=rows(scores, provenance),
        notes=provenance.get("notes", []),
        trust=statements(scores, provenance),
        what_if="what_if" in provenance,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        # UTF-8 cannot encode lone surrogates, which text from data may contain.
        part.write_bytes(html.replace("\0", "").encode("utf-8", "replace"))
    return path


def _require_lengths(
    scores: Scores,
    provenance: Provenance,
    train: object,
    query: object,
    predictions: Sequence[str] | None,
) -> None:
    edited = "edits" in provenance
    if hasattr(train, "__len__") and len(train) != scores.num_train and not edited:
        raise ValueError(
            f"The training set has {len(train)} examples, the scores have {scores.num_train} "
            "columns. Give the data set that was scored."
        )
    last = max(query_indices(scores, provenance), default=-1)
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


def _pool_renderer(pool: object) -> Callable[[int], Rendered] | None:
    if pool is None or (callable(pool) and not hasattr(pool, "__getitem__")):
        return pool
    shown = DatasetRenderer(pool.dataset if isinstance(pool, DataLoader) else pool, None)
    return lambda index: shown("train", index)


def _edited(
    render: Renderer,
    edits: Sequence[EditRecord],
    pool: Callable[[int], Rendered] | None,
    provenance: Provenance,
) -> Renderer:
    """Shows the training example that each column's edit changes, or the one that it adds."""
    pairs = provenance["pool"]["same"] if "pool" in provenance else []
    same = {pair[0]: pair[1] for pair in pairs}

    def rendered(split: str, index: int) -> Rendered:
        if split != "train":
            return render(split, index)
        edit = edits[index]
        if "index" not in edit:
            caption = edit_in_words(edit)
            if "pool" in provenance:
                caption = f"is training example {same[index]} too" if index in same else ""
            added = Rendered() if pool is None else pool(index)
            return replace(added, caption=f"{added.caption} {caption}".strip())
        changed = render(split, edit["index"])
        if not isinstance(changed, Rendered):
            return changed
        return replace(changed, caption=f"{edit_in_words(edit)} {changed.caption}".strip())

    return rendered


@functools.cache  # compiling the template takes longer than filling it
def _environment() -> Environment:
    # autoescape=True and not by file name: everything in this template is untrusted.
    return Environment(
        loader=PackageLoader("tda_lightning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _query(
    scores: Scores,
    provenance: Provenance,
    row: int,
    render: Renderer,
    predictions: Sequence[str] | None,
    k: int,
    names: Sequence[str],
    words: Wording,
) -> QueryView:
    values, k = scores.values[row], min(k, scores.num_scored)
    tails = {"proponent": scores.proponents(row, k), "opponent": scores.opponents(row, k)}
    if words.helps < 0:  # an example that would lower a loss has a negative score
        tails = {"proponent": tails["opponent"], "opponent": tails["proponent"]}
    strongest = max(float(tail.abs().max()) for _, tail in tails.values())
    labels = relabelled(provenance)
    lists, series, totals, shown = {}, [], [], {}
    for kind, (indices, tail) in tails.items():
        # With few examples the tails overlap: each list keeps its own sign only.
        sign = words.helps if kind == "proponent" else -words.helps
        indices, tail = indices[sign * tail > 0], tail[sign * tail > 0]
        parts = None
        if scores.by_segment is not None and len(indices):
            block = scores.by_segment[:, row][:, indices]  # [segment, example]
            parts = block.T.tolist()
            series.append((f"{kind}s", kind, block.sum(1).tolist()))
        tokens = None if scores.by_token is None else scores.by_token[row, indices].tolist()
        members = None if scores.members is None else scores.members[:, row, indices].T.tolist()
        lists[kind] = listing(
            render,
            indices.tolist(),
            tail.tolist(),
            kind,
            strongest,
            parts,
            tokens,
            labels,
            members,
            words.helps,
        )
        shown[kind] = indices
        if len(indices):
            same_sign = values[sign * values > 0].double()
            share = float(tail.double().sum() / same_sign.sum())
            total = number(float(same_sign.sum()), signed=True)
            totals.append((kind, len(same_sign), total, f"{share:.0%}"))
    query_tokens = None
    if scores.by_query_token is not None:
        query_tokens = scores.by_query_token[row][:, shown["proponent"]].sum(1).tolist()
    predictions = predictions or provenance.get("predictions", [])
    measurements = provenance.get("measurements", [])
    told = [len(values) == scores.num_queries for values in (predictions, measurements)]
    return QueryView(
        row,
        arrange(
            (
                example(
                    render,
                    "query",
                    query_indices(scores, provenance)[row],
                    "large",
                    query_tokens,
                    helps=words.helps,
                ),
            )
        ),
        shorten(str(predictions[row]), 200) if told[0] else "",
        words.measured(measurements[row])
        if told[1] and words.sign < 0
        else (one_line(measurements[row]) if told[1] else ""),
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


def _learning_rate_chart(
    scores: Scores, provenance: Provenance, trajectory: Trajectory
) -> Chart | None:
    rates = trajectory.steps.learning_rate
    if not len(rates):
        return None
    steps = range(1, len(rates) + 1)
    bands = [
        (start, stop, f"segment {place}")
        for place, (start, stop) in enumerate(segment_bounds(scores, provenance) or [], start=1)
    ]
    marks = [(step, f"checkpoint at step {step}") for step in sorted(trajectory.checkpoints)]
    # Groups that share a schedule would hide each other.
    curves = list(dict.fromkeys(tuple(column) for column in rates.T.tolist()))
    return line_chart([(steps, curve) for curve in curves[:6]], bands, marks)
