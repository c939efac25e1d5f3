"""Multiplies only those rows in full that can be among the best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.index.best import Best
from tda_lightning.index.compression import Compression, Rough
from tda_lightning.index.row_blocks import RowBlock, RowBlocks

_MOST = 0.25  # share of the rows beyond which it costs more than it saves


@dataclass(frozen=True)
class Pruning:
    """A search that stays exact: it passes over a row only where its rough product and the bound of
    what that is off by show that the row is not among the best.

    Attributes:
        asked: queries, as the compression compares them, [query, any].
        rough: the cheaper product with them.
        largest: no code of a row is larger.
    """

    compression: Compression
    asked: Tensor
    rough: Rough
    largest: float

    def add(self, best: Best, rows: RowBlocks, block: RowBlock) -> bool:
        """Add the rows of a block that may be among the best; False, and nothing is added, where
        too many may."""
        rough = torch.cat([self.rough.products(own) for own in rows.parts(block)], dim=1)
        rough *= block.factors
        # First by a bound for all rows; of those that it lets through, by their own.
        off = self.rough.largest(self.largest)[:, None] * block.factors
        which = best.may_take(rough, off).any(0).nonzero()[:, 0]
        numbers, factors = rows.some(block, which), block.factors[which]
        passing = best.may_take(rough[:, which], self.rough.bound(numbers) * factors)
        if int(passing.sum()) > _MOST * rough.numel():
            return False
        for query in passing.any(1).nonzero()[:, 0].tolist():
            own = passing[query].nonzero()[:, 0]
            alone = slice(query, query + 1)
            products = self.compression.dot(self.asked[alone], numbers[own]) * factors[own]
            best.add(products, which[own] + block.first, alone)
        return True
