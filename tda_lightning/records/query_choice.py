"""Which queries a subscript of scores means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor


def chosen_queries(query: SupportsIndex | slice | Sequence[int] | Tensor, count: int) -> Any:
    """The row, an int, that an index means; the rows, int64, that a slice, a list of indices or a
    mask over queries means.

    Raises:
        IndexError: there is no such query; a subscript of another kind.

    Example:
        >>> chosen_queries(-1, 4), chosen_queries(slice(2), 4)
        (3, tensor([0, 1]))
    """
    rows = torch.arange(count)
    if isinstance(query, slice):
        return rows[query]
    chosen = torch.as_tensor(query)
    if chosen.numel() == 0:
        chosen = chosen.long()
    if chosen.dtype == torch.bool and chosen.ndim == 1:
        if len(chosen) != count:
            raise IndexError(f"A mask over queries must have shape [{count}], got [{len(chosen)}].")
        return rows[chosen]
    if chosen.ndim > 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise IndexError(
            "Queries are chosen by an index, a slice, a list of indices or a mask, got "
            f"{query!r:.80}."
        )
    for number in chosen.reshape(-1).tolist():
        if not -count <= number < count:
            raise IndexError(no_query(number, count))
    return int(rows[chosen]) if chosen.ndim == 0 else rows[chosen]


def no_query(number: int, count: int) -> str:
    """That there is no query of that number."""
    return f"Query {number} does not exist: the scores hold {count} queries, numbered from 0."
