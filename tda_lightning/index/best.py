"""The strongest rows of a search, as it goes through them."""

from __future__ import annotations

import torch
from torch import Tensor

_NONE = torch.iinfo(torch.int64).max  # the index where nothing has been found yet


class Best:
    """The ``k`` largest values of each query so far, and the ``k`` most negative ones.

    Attributes:
        helping, hurting: (values times the sign, indices), [query, k] each, in falling order.
    """

    def __init__(self, queries: int, k: int, dtype: torch.dtype) -> None:
        self.k = k
        self.helping, self.hurting = (
            (
                torch.full((queries, k), -torch.inf, dtype=dtype),
                torch.full((queries, k), _NONE),
            )
            for _ in range(2)
        )

    def add(self, values: Tensor, rows: Tensor, queries: slice = slice(None)) -> None:
        """Values [query, row] of rows with these indices, ascending; of all queries, or of some."""
        for sign, sides in ((1, self.helping), (-1, self.hurting)):
            found, places = (own[queries] for own in sides)
            best, at = _largest(sign * values, min(self.k, values.shape[1]))
            both = torch.cat([found, best], dim=1)
            names = torch.cat([places, rows[at]], dim=1)
            # The lower index first among equal values, whatever the blocks.
            order = names.argsort(dim=1, stable=True)
            both, names = both.gather(1, order), names.gather(1, order)
            order = both.argsort(dim=1, descending=True, stable=True)[:, : self.k]
            found.copy_(both.gather(1, order))
            places.copy_(names.gather(1, order))

    def may_take(self, values: Tensor, off: Tensor) -> Tensor:
        """Which rows may belong here, if their values [query, row] are off by so much at most."""
        helping, hurting = (own[:, -1:] for own, _ in (self.helping, self.hurting))
        return (values + off >= helping) | (off - values >= hurting)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values of every row and their places, the first ones of equal values."""
    best, places = values.topk(count, dim=1)
    least = best[:, -1:]
    if bool(((values == least).sum(1) > (best == least).sum(1)).any()):  # topk takes any of them
        best, places = values.sort(dim=1, descending=True, stable=True)
    return best[:, :count], places[:, :count]
