"""Scores in long form: a row for each query and training example, as columns of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tda_lightning.records.scores import Scores


def long_rows(scores: Scores, queries: range, k: int | None) -> dict[str, np.ndarray[Any, Any]]:
    """Columns of the rows of some queries, ordered by query and rank.

    Args:
        k: of each query only the ``k`` most helpful and the ``k`` most harmful examples; None:
            all.

    Raises:
        ValueError: ``k`` is below 1.
    """
    require_positive(k)
    taken: list[tuple[int, Tensor, Tensor]] = []
    for query in queries:
        if not scores.num_scored:
            continue
        indices, _ = scores.proponents(query, scores.num_scored)
        ranks = torch.arange(1, len(indices) + 1)
        if k is not None and 2 * k < len(indices):
            indices = torch.cat([indices[:k], indices[-k:]])
            ranks = torch.cat([ranks[:k], ranks[-k:]])
        taken.append((query, indices, ranks))
    position = scores.query_indices
    of = "edit" if "edits" in scores.provenance else "train"
    columns = {
        "query": _joined([torch.full_like(i, position[query]) for query, i, _ in taken]),
        of: _joined([indices for _, indices, _ in taken]),
        "rank": _joined([ranks for _, _, ranks in taken]),
        "score": _joined([scores.values[q, i] for q, i, _ in taken], scores.values.dtype),
    }
    if scores.members is not None:
        root = len(scores.members) ** 0.5
        spreads = [scores.members[:, q][:, i].std(0) / root for q, i, _ in taken]
        columns["spread"] = _joined(spreads, scores.values.dtype)
    for number, part in enumerate(() if scores.by_segment is None else scores.by_segment, 1):
        values = [part[q, i] for q, i, _ in taken]
        columns[f"segment_{number}"] = _joined(values, scores.values.dtype)
    return columns


def require_positive(k: int | None) -> None:
    """Refuse a number of examples below 1."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"k must be at least 1, or None for all examples; got {k!r}.")


def _joined(parts: list[Tensor], dtype: torch.dtype = torch.int64) -> np.ndarray[Any, Any]:
    joined = torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
    return np.asarray(joined.numpy())
