"""Rows of an index, some at a time, as numbers that can be multiplied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tda_lightning.index.compression import Compression
from tda_lightning.index.rounding import codes_width, widened
from tda_lightning.store.index_files import Shard

_BLOCK = 1 << 22  # numbers of the rows that are ranked at a time
_FIRST = 1024  # rows of the first block: it is multiplied in full
# Numbers that are widened and multiplied at a time: they stay in the processor's cache, where a
# larger block would be written to memory at four times its size and read again.
_NEAR = 1 << 18
_NEAR_PAIRS = 1 << 20  # of factor pairs, which are multiplied longer than they are moved


@dataclass(frozen=True)
class RowBlock:
    """Some rows of a shard.

    Attributes:
        first: index of the first one.
        codes: as they are stored, [row, column].
        factors: of the products of codes, [row].
    """

    first: int
    codes: NDArray[np.generic]
    factors: Tensor

    def __len__(self) -> int:
        return len(self.codes)


class RowBlocks:
    """Goes through shards; memory does not depend on their number.

    Args:
        dtype: of the stored numbers.
        wanted: of the numbers that are made of them.
        factor: on every product.
    """

    def __init__(
        self, compression: Compression, dtype: str, wanted: torch.dtype, factor: float
    ) -> None:
        self._degree, self._width, self._dtype = compression.degree, compression.width, dtype
        self._factor = factor
        together = _NEAR if compression.degree == 1 else _NEAR_PAIRS
        self._near = max(1, together // self._width)
        self._memory = torch.empty(self._near, codes_width(self._width, dtype), dtype=wanted)

    def of(self, shards: Iterable[Shard]) -> Iterator[RowBlock]:
        """All rows, in order."""
        usual = max(1, _BLOCK // self._width)
        size = min(_FIRST, usual)
        for shard in shards:
            at = 0
            while at < len(shard.codes):
                scales = torch.from_numpy(shard.scales[at : at + size]).to(self._memory.dtype)
                factors = scales**self._degree * self._factor
                yield RowBlock(shard.first + at, shard.codes[at : at + size], factors)
                at, size = at + size, usual

    def parts(self, block: RowBlock) -> Iterator[Tensor]:
        """The numbers of the rows [row, width], part by part; each is good until the next one."""
        for at in range(0, len(block), self._near):
            codes = block.codes[at : at + self._near]
            yield widened(codes, self._dtype, self._width, self._memory)

    def some(self, block: RowBlock, which: Tensor) -> Tensor:
        """The numbers of some rows of a block."""
        codes = block.codes[which.numpy()]
        memory = self._memory.new_empty(len(codes), self._memory.shape[1])
        return widened(codes, self._dtype, self._width, memory)
