"""Queries taken apart: every row is one token of a query, with a measurement of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tda_lightning.runtime.indexed import Keys, one_key


@dataclass(frozen=True)
class QueryRows:
    """The tokens of all queries, one after another.

    Attributes:
        query: that each row belongs to, int64 [row], ascending.
        position: of its token, int64 [row].
        num_query: queries.
        length: positions of the longest.
    """

    query: Tensor
    position: Tensor
    num_query: int
    length: int

    @staticmethod
    def of(chosen: Sequence[Tensor]) -> QueryRows:
        """From which positions each query is measured by, bool [position] each."""
        places = [own.cpu().nonzero().squeeze(1) for own in chosen]
        counts = torch.tensor([len(own) for own in places])
        return QueryRows(
            torch.arange(len(places)).repeat_interleave(counts),
            torch.cat(places),
            len(places),
            max(len(own) for own in chosen),
        )

    def __len__(self) -> int:
        return len(self.query)

    def summed(self, values: Tensor, first_row: int) -> tuple[Tensor, int]:
        """Values [some rows, ...] summed over the rows of each query, and the first query."""
        own = self.query[first_row : first_row + len(values)]
        first, last = int(own[0]), int(own[-1])
        total = values.new_zeros(last + 1 - first, *values.shape[1:])
        return total.index_add_(0, (own - first).to(values.device), values), first


@dataclass(frozen=True)
class RowExamples(Dataset[object]):
    """The query of every row."""

    dataset: Any
    rows: QueryRows
    keys: Keys | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> object:
        if self.keys is not None and self.keys is not one_key:  # the data set makes the batches
            return self.dataset[self.keys([int(self.rows.query[int(one)]) for one in row])]
        return self.dataset[int(self.rows.query[row])]
