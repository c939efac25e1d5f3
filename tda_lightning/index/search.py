"""The best examples of an index for some queries, exactly by what it holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.index.best import Best
from tda_lightning.index.compression import Compression
from tda_lightning.index.rounding import codes_width, widened
from tda_lightning.store.index_files import Shard

_BLOCK = 1 << 22  # numbers of the rows that are ranked at a time
# Of those that are widened and multiplied at a time: they stay in the processor's cache, where a
# larger block would be written to memory at four times its size and read again.
_NEAR = 1 << 18
_NEAR_PAIRS = 1 << 20  # of factor pairs, which are multiplied longer than they are moved


@dataclass(frozen=True)
class SearchResult:
    """The examples that help and hurt each query most, in the unit and sign of
    :class:`~tda_lightning.Scores`: a value is the predicted growth of the query's measurement if
    the example were removed, 1/N included, so that proponents have positive values.

    Of an example that was not in training (:meth:`AttributionIndex.append`) it is that of an
    example with its gradient that had been used as often as an average one: minus the score of its
    :class:`~tda_lightning.edits.Addition`.

    Attributes:
        indices: of the k strongest proponents, best first, int64 [query, k]: rows of the index,
            which are those of the training set; appended examples follow them.
        values: theirs, [query, k].
        opponents: of the k strongest opponents, most negative first, int64 [query, k].
        opponent_values: theirs, [query, k].
        reranked: examples on either side whose values were computed from their exact gradients, if
            they are among these; 0: all values are those of compressed gradients.
        num_examples: rows that were searched.
    """

    indices: Tensor
    values: Tensor
    opponents: Tensor
    opponent_values: Tensor
    reranked: int
    num_examples: int

    @classmethod
    def of(cls, best: Best, num_examples: int) -> SearchResult:
        """What a search found, by compressed gradients alone."""
        (most, helping), (least, hurting) = best.helping, best.hurting
        return cls(helping, most, hurting, -least, 0, num_examples)

    @property
    def num_queries(self) -> int:
        """Rows of the tensors."""
        return len(self.indices)


def search(
    compression: Compression,
    asked: Tensor,
    shards: Iterable[Shard],
    dtype: str,
    k: int,
    factor: float,
) -> Best:
    """Compare queries with every row, block by block: memory does not depend on their number.

    Args:
        asked: what :meth:`Compression.asked` makes of the queries, [query, any].
        dtype: of the stored numbers.
        factor: on every product, such as 1/N; positive.
    """
    best = Best(len(asked), k, asked.dtype)
    width = compression.width
    together = _NEAR if compression.degree == 1 else _NEAR_PAIRS
    size, near = (max(1, numbers // width) for numbers in (_BLOCK, together))
    memory = torch.empty(near, codes_width(width, dtype), dtype=asked.dtype)
    for shard in shards:
        for start in range(0, len(shard.codes), size):
            codes = shard.codes[start : start + size]
            products = [
                compression.dot(asked, widened(codes[at : at + near], dtype, width, memory))
                for at in range(0, len(codes), near)
            ]
            scales = torch.from_numpy(shard.scales[start : start + size]).to(asked.dtype)
            scales = scales**compression.degree * factor
            best.add(torch.cat(products, dim=1) * scales, shard.first + start)
    return best
