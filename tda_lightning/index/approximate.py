"""Sub-linear search of an index by FAISS, for rows that are single vectors."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tda_lightning.index.attribution_index import AttributionIndex
from tda_lightning.index.rounding import numbers_of
from tda_lightning.index.search import SearchResult, require_finite
from tda_lightning.store.index_files import Shard

_LEARNT_FROM = 64  # rows a cell, of which cells are learnt
_LOOKED_AT = 4  # times k: so many that FAISS finds are compared exactly
_BLOCK = 8192  # rows that are added at a time


class ApproximateSearch:
    """Looks for the best rows in a few cells of an inverted file (FAISS), not in all rows.

    Rows are clustered by direction; a query looks into the ``probes`` cells whose centres have the
    largest inner product with it, for proponents, and the most negative one, for opponents. FAISS
    keeps rows in float16, in memory; what it finds is compared again as the index has it, so that
    values are those of :meth:`AttributionIndex.search`. What no looked-at cell holds is missed.

    It is for indices whose rows are compared by one product: ``compression="leading"`` or
    ``"random"``.

    Args:
        index: all of whose shards are there.
        cells: how many; None: 4 times the root of the number of rows.

    Raises:
        ImportError: FAISS is not installed.
        ValueError: the rows are factor pairs, or ``cells`` is not between 1 and their number.

    References:
        | The Faiss library (Douze et al., 2024)
        | https://arxiv.org/abs/2401.08281
    """

    def __init__(self, index: AttributionIndex, cells: int | None = None) -> None:
        if find_spec("faiss") is None:
            raise ImportError(
                "Sub-linear search needs FAISS, which is not installed: pip install "
                "'tda-lightning[faiss]', or use AttributionIndex.search, which compares all rows."
            )
        if index.compression.degree != 1:
            raise ValueError(
                "Sub-linear search needs rows that are single vectors, and those of this index are "
                "factor pairs. Build one with compression='leading', or use "
                "AttributionIndex.search, which compares all rows."
            )
        rows = index.num_examples
        self.cells = min(rows, math.ceil(4 * rows**0.5)) if cells is None else cells
        if not 1 <= self.cells <= rows:
            raise ValueError(f"cells must be between 1 and {rows} rows, got {cells}.")
        self._index = index
        self._shards = list(index.shards())
        self._first = np.array([shard.first for shard in self._shards])
        self._file = self._filled()

    def search_encoded(self, asked: Tensor, k: int = 10, probes: int = 16) -> SearchResult:
        """The ``k`` strongest proponents and opponents among the rows of some cells.

        Args:
            asked: queries, as :meth:`AttributionIndex.encode` makes them.
            k: how many; a query whose cells hold fewer has index -1 and value 0 in the others'
                places.
            probes: cells that are looked into, on either side.

        Raises:
            NonFiniteError: a query's gradient is not finite.
            ValueError: ``k`` or ``probes`` out of range.
        """
        rows = self._index.num_examples
        if not 1 <= k <= rows:
            raise ValueError(f"k must be between 1 and the number of examples, {rows}; got {k}.")
        if not 1 <= probes <= self.cells:
            raise ValueError(f"probes must be between 1 and {self.cells} cells, got {probes}.")
        require_finite(asked)
        self._file.nprobe = probes
        vectors, looked_at = asked.float().numpy(), min(rows, _LOOKED_AT * k)
        sides = []
        for sign in (1, -1):
            _, found = self._file.search(np.ascontiguousarray(sign * vectors), looked_at)
            sides.append(self._ranked(asked, found, k, sign))
        (helping, values), (hurting, least) = sides
        return SearchResult(helping, values, hurting, least, 0, rows)

    def _filled(self) -> Any:
        import faiss

        width = self._index.compression.width
        centres = faiss.IndexFlatIP(width)
        kind, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        file = faiss.IndexIVFScalarQuantizer(centres, width, self.cells, kind, metric)
        file.cp.spherical, file.cp.min_points_per_centroid = True, 1
        wanted = min(self._index.num_examples, _LEARNT_FROM * self.cells)
        step = max(1, self._index.num_examples // wanted)
        directions = np.concatenate(
            [self._rows(own, np.arange(0, len(own.codes), step)) for own in self._shards]
        )
        lengths = np.linalg.norm(directions, axis=1, keepdims=True)
        file.train(directions / np.maximum(lengths, np.finfo(np.float32).tiny))
        for shard in self._shards:
            for at in range(0, len(shard.codes), _BLOCK):
                places = np.arange(at, min(at + _BLOCK, len(shard.codes)))
                file.add_with_ids(self._rows(shard, places), places + shard.first)
        return file

    def _rows(self, shard: Shard, places: np.ndarray) -> np.ndarray:
        facts = self._index.facts
        numbers = numbers_of(shard.codes[places], facts.dtype, facts.width).numpy()
        scaled = numbers * shard.scales[places][:, None]
        return np.ascontiguousarray(scaled, dtype=np.float32)

    def _ranked(self, asked: Tensor, found: np.ndarray, k: int, sign: int) -> tuple[Tensor, Tensor]:
        """The best ``k`` of what was found, by the rows of the index: indices, values."""
        factor = 1 / self._index.facts.num_train
        indices = torch.full((len(asked), k), -1)
        values = torch.zeros(len(asked), k, dtype=asked.dtype)
        for query, candidates in enumerate(found):
            own = np.unique(candidates[candidates >= 0])
            if not len(own):
                continue
            shards = np.searchsorted(self._first, own, side="right") - 1
            rows = [
                self._rows(self._shards[n], own[shards == n] - self._first[n])
                for n in np.unique(shards)
            ]
            compared = self._index.compression.dot(
                asked[query : query + 1], torch.from_numpy(np.concatenate(rows)).to(asked)
            )
            # The lower index first among equal values, as a search of all rows has it.
            order = (sign * compared[0]).argsort(descending=True, stable=True)[:k]
            indices[query, : len(order)] = torch.from_numpy(own)[order]
            values[query, : len(order)] = compared[0, order] * factor
        return indices, values
