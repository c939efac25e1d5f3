"""One pass over rows of an index: read, multiply, keep the strongest.

Rows are int8 or float16 with a scale each. They are widened to float32 in blocks that stay in the
processor's cache: widening a whole chunk at once writes four times its bytes to memory and reads
them again, which takes several times as long as the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Index of the first row, codes [row, width], scales [row].
Chunk = tuple[int, Tensor, Tensor]
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


def scan(chunks: Iterable[Chunk], queries: Tensor, k: int) -> Strongest:
    """The strongest of all rows.

    Args:
        chunks: what :meth:`Rows.chunks` gives.
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
        found.add(first, scores * scales[:, None])
    return found


@dataclass(frozen=True)
class Rows:
    """Rows that lie in one piece in a file: row n stands for ``scales[n] * codes[n]``.

    Attributes:
        offset: bytes before the first one.
        first: index of the first one.
        width: numbers in each.
        dtype: int8 or float16.
        scales: float32 [row].
    """

    offset: int
    first: int
    width: int
    dtype: torch.dtype
    scales: Tensor

    @property
    def bytes(self) -> int:
        """Of the codes and scales."""
        return len(self.scales) * (self.width * self.dtype.itemsize + 4)

    def chunks(self, file: Any, bytes_at_once: int = 1 << 24) -> Iterator[Chunk]:
        """Codes and scales, read one after another; each chunk is good until the next one is asked
        for.

        Args:
            file: open for reading, of any kind that has ``seek`` and ``readinto``.

        Raises:
            EOFError: the file ends before the rows do.
        """
        size, count = self.width * self.dtype.itemsize, len(self.scales)
        each = max(BLOCK, bytes_at_once // size // BLOCK * BLOCK)
        buffers = [memoryview(bytearray(min(each, count) * size)) for _ in range(2)]
        file.seek(self.offset)

        def read(place: int) -> memoryview:
            view = buffers[place % 2][: min(each, count - place * each) * size]
            got = 0
            while got < len(view):
                part = file.readinto(view[got:])
                if not part:
                    row = self.first + place * each + got // size
                    raise EOFError(f"The shard ends at row {row}, not at {self.first + count}.")
                got += part
            return view

        # The next chunk is read while this one is multiplied: the slower of the two takes the time.
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(read, 0)
            for place in range(-(-count // each)):
                view = ahead.result()
                if (place + 1) * each < count:
                    ahead = reader.submit(read, place + 1)
                codes = torch.frombuffer(view, dtype=self.dtype).view(-1, self.width)
                start = place * each
                yield self.first + start, codes, self.scales[start : start + len(codes)]
