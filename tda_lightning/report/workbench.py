"""What the page's script works with: numbers about all examples, and the examples that are kept.

Everything is JSON; long lists of numbers are little-endian arrays in base64. A page at its default
size holds up to 100,000 training examples by keeping of each only numbers, and pictures, sounds,
texts and rows of those that are likely to be looked at.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tda_lightning.records.provenance import Provenance
from tda_lightning.records.scores import Scores
from tda_lightning.report.agreement import agreement, agreement_of_members, ranks
from tda_lightning.report.columns import Column
from tda_lightning.report.groups import group_sums, matrix, proponents_in_all, regions
from tda_lightning.report.kept import KeptExamples, Look
from tda_lightning.report.provenance_rows import query_indices
from tda_lightning.report.query_order import Judged, relative_spread
from tda_lightning.report.stand_ins import stand_ins
from tda_lightning.report.triage import Triage, triage
from tda_lightning.report.wording import Wording
from tda_lightning.runtime.digests import digest

_LISTED = 50  # proponents, and opponents, of a query
_DIFFERENT = 20  # further ones for which another file has its strongest scores
_BINS = 61
_MOST_QUERIES = 500  # with a list of proponents
_MOST_ROWS = 100_000  # training examples whose numbers are kept
_MOST_RENDERED = 5000  # examples of which more than numbers is kept
_SHARE_OF_LISTS = 0.4  # of the page


@dataclass(frozen=True)
class Workbench:
    """Numbers of the page, before any example is kept.

    Attributes:
        numbers: what is written down, but for the examples.
        listed: queries with a list of proponents and opponents, in order, with the training
            examples on it, the strongest of both first.
        triaged: training examples in the order in which they are suspicious.
    """

    numbers: dict[str, Any]
    listed: dict[int, list[int]]
    triaged: list[int]

    @property
    def size(self) -> int:
        """Bytes of the numbers in the page."""
        return len(as_script(self.numbers))


def workbench(
    scores: Scores,
    provenance: Provenance,
    judged: Judged,
    columns: list[Column],
    *,
    shown: Sequence[int],
    k: int,
    segments: Sequence[str],
    words: Wording,
    labels: Mapping[str, object],
    others: Mapping[str, Scores],
    features: Tensor | None,
    max_bytes: float,
) -> Workbench:
    """The numbers for the page's script.

    Args:
        columns: of the data, the label first.
        shown: rows of the queries that the page shows in any case, first.
        k: proponents, and opponents, of which scores of single terms are kept.
        segments: names of the segments of training.
        words: what scores of either sign are called.
        labels: the labels as the data set has them, by their names.
        others: scores to compare with, by name.
        features: of the training examples, by which some stand for others; None: their scores.
        max_bytes: size of the page.
    """
    label = columns[0] if columns and columns[0].is_label else None
    found = triage(scores, label, words.helps)
    order = judged.order(scores.num_queries)
    each = _bytes_of_a_list(scores, len(others))
    room = int(min(_MOST_QUERIES, _SHARE_OF_LISTS * max_bytes / each))
    listed = list(dict.fromkeys([*shown, *order]))[: max(len(shown), room)]
    lists = {row: _list(scores, row, k, others, words.helps, features) for row in listed}
    strength, number = proponents_in_all(scores, words.helps)
    sums = group_sums(scores, columns)
    rows, triaged = _kept_rows(scores, found, words.helps)
    numbers = {
        "id": _identity(scores),
        "numTrain": scores.num_train,
        "numScored": scores.num_scored,
        "numQueries": scores.num_queries,
        "segments": list(segments),
        "members": 0 if scores.members is None else len(scores.members),
        "others": list(others),
        "edits": "edits" in provenance,
        "words": {
            "quantity": words.quantity,
            "sign": words.sign,
            "helps": words.helps,
            "examples": "example of the pool" if words.pool else "training example",
            "headings": words.headings,
            "effects": words.effects,
        },
        "columns": [
            {
                "name": column.name,
                "groups": column.groups,
                "isLabel": column.is_label,
                "train": packed(column.train[rows.numpy()], "i2"),
                "query": None if column.query is None else packed(column.query, "i2"),
            }
            for column in columns
        ],
        "labels": dict(labels),
        "queries": {
            "index": query_indices(scores, provenance),
            "order": packed(np.array(order), "i4"),
            "predictions": judged.predictions,
            "wrong": [None if state is None else int(state) for state in judged.wrong],
            "measurement": packed(np.array(judged.measurements), "f4"),
            "spread": packed(np.array(relative_spread(scores)), "f4"),
            "strength": packed(strength, "f4"),
            "proponents": packed(number, "f4"),
        },
        "lists": {str(row): entry for row, (_, entry) in lists.items()},
        "train": {
            "index": None if len(rows) == scores.num_train else packed(rows, "i4"),
            "selfInfluence": _or_none(scores.self_influence, rows),
            "harmed": packed(found.harmed[rows], "i4"),
            "net": packed(found.net[rows], "f4"),
            "disagreement": _or_none(found.disagreement, rows),
            "suggested": None if found.suggested is None else packed(found.suggested[rows], "i2"),
        },
        "groups": [
            {
                "name": entry.column.name,
                "sums": packed(entry.sums[listed], "f4"),
                "segments": None
                if entry.by_segment is None
                else packed(entry.by_segment[:, listed], "f4"),
                "mean": packed(entry.sums.mean(0), "f4"),
                "meanBySegment": None
                if entry.by_segment is None
                else packed(entry.by_segment.mean(1), "f4"),
                "matrices": {
                    column.name: packed(matrix(entry.sums, column), "f4")
                    for column in columns
                    if column.query is not None
                },
            }
            for entry in sums
        ],
        "regions": [_finite(vars(region)) for region in regions(strength, number, columns, judged)],
        "listed": listed,
        "agreement": [
            _finite({"name": name, **vars(agreement(scores, other, listed, words.helps))})
            for name, other in others.items()
        ],
    }
    return Workbench(numbers, {row: indices for row, (indices, _) in lists.items()}, triaged)


def keep_examples(
    work: Workbench, kept: KeptExamples, queries: Sequence[int], shown: int, k: int
) -> dict[str, Any]:
    """Keep what is likely to be looked at, the most likely first, until the page is full.

    Args:
        queries: positions of the queries in their data set, by row.
        shown: number of queries that have a section.
        k: proponents, and opponents, in a section.

    Returns:
        The examples by their keys, as JSON can hold them.
    """
    enlarged: dict[tuple[str, int], str] = {}
    room_at_first = kept.room
    for number, (split, index) in enumerate(_likely(work, queries, shown, k)):
        if number >= _MOST_RENDERED or not kept.keep(split, index):
            break
        # Larger pictures only of what comes first: each takes the room of many small ones.
        if number < _MOST_RENDERED // 10 and kept.room > 0.6 * room_at_first:
            larger = kept.enlarged(split, index)
            if larger is not None:
                enlarged[split, index] = larger
    return {
        f"{split}-{index}": _as_json(look, enlarged.get((split, index)))
        for (split, index), look in kept.kept.items()
    }


def _likely(
    work: Workbench, queries: Sequence[int], shown: int, k: int
) -> Iterator[tuple[str, int]]:
    lists = list(work.listed.items())
    for row, indices in lists[:shown]:
        yield "query", queries[row]
        yield from (("train", index) for index in indices[: 2 * k])
    yield from (("train", index) for index in work.triaged[:100])
    for row, indices in lists[shown:]:
        yield "query", queries[row]
        yield from (("train", index) for index in indices[: min(16, 2 * k)])
    yield from (("train", index) for index in work.triaged[100:1000])
    for _, indices in lists:
        yield from (("train", index) for index in indices[2 * k :])


def _as_json(look: Look, enlarged: str | None) -> dict[str, Any]:
    entry = {
        "caption": look.caption,
        "image": look.image,
        "shape": look.shape if look.image is not None else None,
        "sound": look.sound,
        "text": look.text,
        "row": None if look.row is None else dict(look.row),
        "pieces": look.pieces,
        "enlarged": enlarged,
    }
    return {name: value for name, value in entry.items() if value is not None}


def _list(
    scores: Scores,
    row: int,
    k: int,
    others: Mapping[str, Scores],
    helps: int,
    features: Tensor | None,
) -> tuple[list[int], dict[str, Any]]:
    """The strongest training examples of one query, and what is said of each."""
    values = scores.values[row]
    count = min(_LISTED, scores.num_scored)
    helpful, helped = scores.proponents(row, count)
    harmful, harmed = scores.opponents(row, count)
    signed: list[list[int]] = [helpful[helped > 0].tolist(), harmful[harmed < 0].tolist()]
    # The first k of both in turn, then the others.
    strongest = [index for place in range(k) for tail in signed for index in tail[place:][:1]]
    chosen = dict.fromkeys([*strongest, *signed[0], *signed[1]])
    for other in others.values():
        few = min(_DIFFERENT, other.num_scored)
        for tail in (other.proponents(row, few), other.opponents(row, few)):
            chosen |= dict.fromkeys(tail[0].tolist())
    indices = list(chosen)
    at = torch.tensor(indices, dtype=torch.int64)
    entry: dict[str, Any] = {
        "index": packed(at, "i4"),
        "score": packed(values[at], "f4"),
        "histogram": _histogram(values),
    }
    if (stands := stand_ins(scores, row, at, helps, features)) is not None:
        entry["stands"] = packed(stands, "f4")
    if scores.by_segment is not None:
        entry["segments"] = packed(scores.by_segment[:, row][:, at].T, "f4")
    if scores.members is not None:
        members = torch.nan_to_num(scores.members[:, row].double())
        entry["spread"] = packed(members[:, at].std(0) / len(members) ** 0.5, "f4")
        same = (members[:, at] * values[at].double() > 0).sum(0)
        entry["sameSign"] = packed(same, "i2")
        top = (helps * members).topk(count, dim=1).indices
        entry["inTop"] = packed((top[:, :, None] == at).any(1).sum(0), "i2")
        entry |= _finite({"agreement": agreement_of_members(scores, row)})
    if scores.by_token is not None:
        terms = scores.by_token[row, at[: 2 * k]]
        entry["terms"] = packed(terms, "f4")
        entry["numTerms"] = terms.shape[1]
    if others:
        # Of the page's own scores first.
        entry["ranks"] = [
            packed(ranks(each.values[row])[at], "i4") for each in (scores, *others.values())
        ]
        entry["others"] = [packed(other.values[row][at], "f4") for other in others.values()]
    return indices, entry


def _histogram(values: Tensor) -> dict[str, Any]:
    known = values[~values.isnan()].double().numpy()
    largest = float(np.abs(known).max(initial=0.0)) or 1.0
    counts, _ = np.histogram(known / largest, bins=_BINS, range=(-1, 1))
    return {"largest": largest, "counts": counts.tolist()}


def _kept_rows(scores: Scores, found: Triage, helps: int) -> tuple[Tensor, list[int]]:
    """Training examples whose numbers are kept, in order, and those most suspicious first."""
    measures = [
        scores.self_influence,
        found.disagreement,
        found.harmed.double(),
        -helps * found.net,
    ]
    orders = [
        measure.argsort(descending=True, stable=True) for measure in measures if measure is not None
    ]
    few = min(1000, scores.num_train)
    turns = torch.stack([order[:few] for order in orders], dim=1).flatten().tolist()
    triaged = list(dict.fromkeys(turns))
    if scores.num_train <= _MOST_ROWS:
        return torch.arange(scores.num_train), triaged
    each = torch.stack([order[:_MOST_ROWS] for order in orders], dim=1).flatten().tolist()
    first = list(dict.fromkeys(each))[:_MOST_ROWS]
    return torch.tensor(sorted(first)), triaged


def _or_none(values: Tensor | None, rows: Tensor) -> dict[str, str] | None:
    return None if values is None else packed(values[rows], "f4")


def _bytes_of_a_list(scores: Scores, others: int) -> int:
    """About how much of a page the list of one query takes."""
    entries = 2 * (_LISTED + _DIFFERENT * others)
    segments = 0 if scores.by_segment is None else len(scores.by_segment)
    members = 0 if scores.members is None else 2
    terms = 0 if scores.by_token is None else scores.by_token.shape[2] * 16
    return int(16 / 3 * (entries * (3 + segments + members + 2 * others) + terms)) + 600


def _identity(scores: Scores) -> str:
    """Names the scores, so that a browser finds the marks that were made on this page."""
    first = scores.values[:1].double()
    return digest([list(scores.values.shape), first])[:16]


def packed(values: Tensor | np.ndarray, form: str) -> dict[str, str]:
    """Numbers as a little-endian array in base64.

    Args:
        form: i2 or i4 for integers, f4 for floats.
    """
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    with np.errstate(over="ignore"):  # beyond float32 they are infinite
        data = np.ascontiguousarray(array.astype(f"<{form}")).tobytes()
    return {form: base64.b64encode(data).decode("ascii")}


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with None in place of what JSON cannot hold."""

    def known(value: Any) -> Any:
        if isinstance(value, list):
            return [known(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: known(value) for name, value in record.items()}


def as_script(value: object) -> str:
    """JSON that may stand in a script element, whatever the texts in it say."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
