"""The best examples of an index for some queries, exactly by what it holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.index.best import Best
from tda_lightning.index.compression import Compression
from tda_lightning.index.pruning import Pruning
from tda_lightning.index.rounding import largest_code
from tda_lightning.index.row_blocks import RowBlocks
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.store.index_files import Shard


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


def require_finite(numbers: Tensor) -> None:
    """Refuse queries whose gradients or values [query, any] are not finite.

    Raises:
        NonFiniteError: one has.
    """
    finite = numbers.isfinite().all(1)
    if not bool(finite.all()):
        raise NonFiniteError(
            f"The gradient of query {int((~finite).nonzero()[0])} is NaN or infinite, or its "
            "products with examples are, so no example is its strongest. Look at this query and "
            "its measurement."
        )


def search(
    compression: Compression,
    asked: Tensor,
    shards: Iterable[Shard],
    dtype: str,
    k: int,
    factor: float,
) -> Best:
    """Compare queries with every row, block by block: memory does not depend on their number.

    The first block is multiplied in full. Of later ones, where the compression has a rough product,
    only the rows that this does not rule out by its bound: what is found is the same.

    Args:
        asked: what :meth:`Compression.asked` makes of the queries, [query, any].
        dtype: of the stored numbers.
        factor: on every product, such as 1/N; positive.
    """
    best = Best(len(asked), k, asked.dtype)
    rows = RowBlocks(compression, dtype, asked.dtype, factor)
    largest = largest_code(dtype)
    pruning: Pruning | None = None
    for number, block in enumerate(rows.of(shards)):
        if pruning is not None:
            if pruning.add(best, rows, block):
                continue
            pruning = None
        products = [compression.dot(asked, own) for own in rows.parts(block)]
        indices = torch.arange(block.first, block.first + len(block))
        best.add(torch.cat(products, dim=1) * block.factors, indices)
        if number == 0 and largest is not None:
            rough = compression.rough(asked)
            pruning = None if rough is None else Pruning(compression, asked, rough, largest)
    return best
