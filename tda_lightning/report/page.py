"""Writes the report: collects what the page shows and fills the template.

Scores, data, provenance and file names are untrusted text: the template escapes all of it, and the
page's own policy forbids loading anything and running anything but its own script, by its digest.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor
from torch.utils.data import DataLoader

from tda_lightning.records.provenance import EditRecord, Provenance, well_formed
from tda_lightning.records.rendered import Rendered, Renderer
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.report.agreement import require_comparable
from tda_lightning.report.charts import Chart, bar_chart, line_chart, number
from tda_lightning.report.columns import Column, Columns, group, guess, raw_labels
from tda_lightning.report.dataset_renderer import DatasetRenderer
from tda_lightning.report.examples import Example, Listing, arrange, example, listing
from tda_lightning.report.kept import KeptExamples
from tda_lightning.report.provenance_rows import (
    one_line,
    query_indices,
    rows,
    segment_bounds,
    segment_names,
)
from tda_lightning.report.query_order import Judged, judge
from tda_lightning.report.statements import edit_in_words, relabelled, statements
from tda_lightning.report.wording import Wording, wording
from tda_lightning.report.workbench import as_script, keep_examples, workbench
from tda_lightning.runtime.digests import script_digest
from tda_lightning.store.atomic_write import replacing

_SHOWN = 12  # queries with a section of their own
_OVERHEAD = 250_000  # bytes of the page that are neither numbers nor examples
# In the order in which they need each other.
_SCRIPTS = ("base", "numbers", "marks", "example", "queries", "triage", "groups", "compare", "main")


@dataclass(frozen=True)
class QueryView:
    """What the page shows of one query."""

    row: int
    shown: Listing  # the query itself, as a list of one
    prediction: str
    wrong: bool
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
    columns: Columns | None = None,
    query_columns: Columns | None = None,
    compare: Mapping[str, Scores] | None = None,
    features: Tensor | None = None,
    max_megabytes: float = 10.0,
) -> Path:
    """Write the scores as one HTML file that needs no network.

    In a browser that runs its script the page is a workbench: queries are searched and sorted,
    training examples are marked as wrong, right or to be relabelled, and the marks are exported.
    Without scripts it shows the queries asked for and the most suspicious training examples.
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
        queries: rows of the scores to show without scripts, and first; by default 12 with wrong
            predictions or, after these, the largest measurements.
        k: number of proponents, and of opponents, shown for each query at first.
        num_suspects: length of the ranking by self-influence without scripts.
        pool: the examples that were scored as additions: a data set, or a function that shows
            example ``index``.
        title: heading of the page.
        columns: values by which training examples are grouped, one for each, by the name of the
            column; "class" or "label" is what the model should predict. By default the labels of
            ``train``, where they can be read.
        query_columns: likewise for each query of ``query``.
        compare: other scores of the same queries and training examples, by name.
        features: of the training examples, [train, feature], such as the last layer's inputs: the
            page names a few proponents of each query that stand for the others. By default
            training examples with like scores for all queries are alike.
        max_megabytes: size of the page, in MiB. Pictures, sounds and texts beyond it are left out.

    Returns:
        The path of the file.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        ValueError: data sets, columns or predictions of another length than the scores, or scores
            that cannot be compared.
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
    require_comparable(scores, compare or {})
    if queries is not None and any(not 0 <= row < scores.num_queries for row in queries):
        raise IndexError(
            f"queries must lie in 0 to {scores.num_queries - 1}, the rows of the scores; got "
            f"{list(queries)}."
        )
    if features is not None and (features.ndim != 2 or len(features) != scores.num_train):
        raise ValueError(
            f"features must be [{scores.num_train}, feature], got {list(features.shape)}."
        )
    if k < 1 or num_suspects < 1 or not max_megabytes > 0:
        raise ValueError(
            f"k, num_suspects and max_megabytes must be positive, got {k}, {num_suspects} and "
            f"{max_megabytes}."
        )
    positions = query_indices(scores, provenance)
    class_names = getattr(render, "class_names", None)
    grouped = _columns(
        scores,
        positions,
        guess(train, class_names) if columns is None else columns,
        guess(query, class_names) if query_columns is None else query_columns,
        edited="edits" in provenance,
    )
    render = render or DatasetRenderer(train, query)
    if edits := provenance.get("edits"):
        render = _edited(render, edits, _pool_renderer(pool), provenance)
    words = wording(provenance)
    label = grouped[0] if grouped and grouped[0].is_label else None
    judged = judge(scores, provenance, label, predictions)
    shown = list(judged.order(scores.num_queries)[:_SHOWN] if queries is None else queries)
    names = segment_names(scores, provenance)
    max_bytes = max_megabytes * 2**20
    work = workbench(
        scores,
        provenance,
        judged,
        grouped,
        shown=shown,
        k=min(k, scores.num_scored),
        segments=names,
        words=words,
        labels=_label_values(label, train),
        others=compare or {},
        features=features,
        max_bytes=max_bytes,
    )
    kept = KeptExamples(render, max_bytes - work.size - _OVERHEAD)
    views = [_query(scores, provenance, row, kept, judged, k, names, words) for row in shown]
    suspects = _suspects(scores, kept, num_suspects)
    work.numbers["examples"] = keep_examples(work, kept, positions, len(shown), k)
    work.numbers["leftOut"] = kept.left_out
    rates = None if trajectory is None else _learning_rate_chart(scores, provenance, trajectory)
    script = page_script()
    html = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            scores=scores,
            estimator=provenance.get("estimator", ""),
            segment_names=names,
            queries=views,
            suspects=suspects,
            self_influence=_self_influence_chart(scores),
            learning_rate=rates,
            provenance=rows(scores, provenance),
            notes=provenance.get("notes", []),
            trust=statements(scores, provenance),
            what_if="what_if" in provenance,
            words=words,
            script=script,
            script_digest=script_digest(script),
            data=as_script(work.numbers),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        # UTF-8 cannot encode lone surrogates, which text from data may contain.
        part.write_bytes(html.replace("\0", "").encode("utf-8", "replace"))
    return path


def _columns(
    scores: Scores, positions: Sequence[int], train: Columns, query: Columns, edited: bool
) -> list[Column]:
    """The columns of training examples, and of those queries that were scored."""
    if edited:  # the columns of the scores are edits, not examples
        return []
    for name, values in train.items():
        if len(values) != scores.num_train:
            raise ValueError(
                f"columns must hold one value for each of the {scores.num_train} training "
                f"examples, got {len(values)} in {name!r}."
            )
    last = max(positions, default=-1)
    for name, values in query.items():
        if len(values) <= last:
            raise ValueError(
                f"query_columns must hold one value for each query of the data set, of which query "
                f"{last} was scored; got {len(values)} in {name!r}."
            )
    return group(train, query, positions)


def _label_values(label: Column | None, train: object) -> dict[str, object]:
    """The labels of the training set by their names; empty where names and labels do not match."""
    raw = None if label is None else raw_labels(train)
    if label is None or raw is None or len(raw) != len(label.train):
        return {}
    values: dict[str, object] = {}
    for place, value in zip(label.train.tolist(), raw, strict=True):
        if values.setdefault(label.groups[place], value) != value:
            return {}
    return values


@functools.cache
def page_script() -> str:
    """The page's own script, of several files."""
    folder = files("tda_lightning.report") / "templates" / "workbench"
    parts = [(folder / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n"


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


def _pool_renderer(pool: Any) -> Callable[[int], Rendered] | None:
    if pool is None:
        return None
    if callable(pool) and not hasattr(pool, "__getitem__"):
        return pool  # type: ignore[no-any-return]
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
    kept: KeptExamples,
    judged: Judged,
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
    lists, series, totals, listed = {}, [], [], {}
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
            kept,
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
        listed[kind] = indices
        if len(indices):
            same_sign = values[sign * values > 0].double()
            share = float(tail.double().sum() / same_sign.sum())
            total = number(float(same_sign.sum()), signed=True)
            totals.append((kind, len(same_sign), total, f"{share:.0%}"))
    query_tokens = None
    if scores.by_query_token is not None:
        query_tokens = scores.by_query_token[row][:, listed["proponent"]].sum(1).tolist()
    measurement = judged.measurements[row] if judged.measurements else None
    index = query_indices(scores, provenance)[row]
    return QueryView(
        row,
        arrange((example(kept, "query", index, query_tokens, words.helps),)),
        judged.predictions[row] if judged.predictions else "",
        bool(judged.wrong and judged.wrong[row]),
        "" if measurement is None else one_line(words.sign * measurement),
        tuple(totals),
        lists["proponent"],
        lists["opponent"],
        bar_chart(series, names) if series else None,
    )


def _suspects(scores: Scores, kept: KeptExamples, count: int) -> Listing | None:
    if scores.self_influence is None:
        return None
    ordered, indices = scores.self_influence.sort(descending=True, stable=True)
    count = min(count, scores.num_train)
    values = ordered[:count].tolist()
    strongest = max(map(abs, values), default=0.0)
    return listing(kept, indices[:count].tolist(), values, "suspect", strongest)


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
