"""One pass over rows of an index: read, multiply, keep the strongest.

Rows are int8 with a scale each, or float16. They are widened to float32 in blocks that stay in the
processor's cache: widening a whole chunk at once writes four times its bytes to memory and reads
them again, which takes several times as long as the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # rows that are multiplied at a time


class Strongest:
    """The k largest and the k smallest scores of each query so far.

    Attributes:
        values: [2, query, k]; the smallest ones with their signs turned.
        indices: int64 [2, query, k].
        rows: that were looked at.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.rows = 0
        self.values = torch.full((2, queries, k), -torch.inf)
        self.indices = torch.full((2, queries, k), -1)

    def add(self, first: int, scores: Tensor) -> None:
        """Scores [row, query] of the examples from ``first`` on."""
        self.rows += len(scores)
        for side, extremes in enumerate((scores.amax(0), -scores.amin(0))):
            # After the first chunks, most have nothing that belongs here.
            for query in (extremes > self.values[side, :, -1]).nonzero()[:, 0].tolist():
                own = scores[:, query] if side == 0 else -scores[:, query]
                values, places = own.topk(min(self.k, len(own)))
                self._take(side, query, values, places + first)

    def _take(self, side: int, query: int, values: Tensor, indices: Tensor) -> None:
        both = torch.cat([self.values[side, query], values])
        numbers = torch.cat([self.indices[side, query], indices])
        self.values[side, query], order = both.topk(self.k)
        self.indices[side, query] = numbers[order]

    def merge(self, values: Tensor, indices: Tensor) -> None:
        """Take over what another pass found, as ``values`` and ``indices``."""
        both = torch.cat([self.values, values], 2)
        numbers = torch.cat([self.indices, indices], 2)
        self.values, order = both.topk(self.k, dim=2)
        self.indices = numbers.gather(2, order)


def scan(chunks: Iterable[tuple[int, Tensor, Tensor | None]], queries: Tensor, k: int) -> Strongest:
    """The strongest of all rows.

    Args:
        chunks: (index of the first row, rows [row, width], scales [row] or None).
        queries: float32 [query, width].
    """
    found = Strongest(len(queries), k)
    columns = queries.T.contiguous()
    wide = torch.empty(BLOCK, queries.shape[1])
    for first, rows, scales in chunks:
        scores = torch.empty(len(rows), len(queries))
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            own = wide[: len(block)]
            own.copy_(block)
            torch.mm(own, columns, out=scores[start : start + BLOCK])
        if scales is not None:
            scores *= scales[:, None]
        found.add(first, scores)
    return found


def chunks_of(
    file: Any, width: int, kind: torch.dtype, rows: tuple[int, int], bytes_at_once: int = 1 << 24
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """The rows from ``rows[0]`` to ``rows[1]`` of a shard, read one after another; each chunk is
    good until the next one is asked for.

    A shard is its rows without anything between them, each preceded by a float32 scale where
    ``kind`` is int8.

    Args:
        file: open for reading, of any kind that has ``seek`` and ``readinto``.
    """
    scaled = kind == torch.int8
    size = width * kind.itemsize + 4 * scaled
    each = max(BLOCK, bytes_at_once // size // BLOCK * BLOCK)
    buffers = [memoryview(bytearray(each * size)) for _ in range(2)]
    file.seek(rows[0] * size)

    def read(place: int, first: int) -> memoryview:
        view = buffers[place % 2][: min(each, rows[1] - first) * size]
        got = 0
        while got < len(view):
            part = file.readinto(view[got:])
            if not part:
                raise EOFError(f"The shard ends at row {first + got // size}, not at {rows[1]}.")
            got += part
        return view

    # The next chunk is read while this one is multiplied: the slower of the two takes the time.
    with ThreadPoolExecutor(1) as reader:
        starts = range(rows[0], rows[1], each)
        ahead = reader.submit(read, 0, rows[0]) if starts else None
        for place, first in enumerate(starts):
            assert ahead is not None
            view = ahead.result()
            if place + 1 < len(starts):
                ahead = reader.submit(read, place + 1, starts[place + 1])
            raw = torch.frombuffer(view, dtype=torch.uint8).view(-1, size)
            if scaled:
                scales = raw[:, :4].contiguous().view(torch.float32)[:, 0]
                yield first, raw[:, 4:].view(torch.int8), scales
            else:
                yield first, raw.view(kind), None
