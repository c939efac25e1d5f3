r"""Products of queries with factor pairs, computed roughly, with a bound on what they are off by.

A query's matrix Q of a layer has few directions that matter: :math:`Q = P W^\top + R` with c
columns each and a small rest. So :math:`u^\top Q v` is about :math:`(P^\top u) \cdot (W^\top v)`,
which takes c (a + b) products in place of a b, and is off by at most
:math:`\lVert R \rVert_2 \lVert u \rVert \lVert v \rVert`. A search multiplies in full only the
rows that this bound does not rule out (``search.py``), so that it stays exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RANK = 32  # c: more costs every row, less lets more rows through
_ROUNDS = 2  # of subspace iteration
_ROUNDING = 64  # times the precision: of sums of some thousand products


@dataclass(frozen=True)
class RoughBlock:
    """The part of one layer.

    Attributes:
        pairs: how many an example has.
        row: P for u, [groups, a, query * c].
        column: W for v, [groups, b, query * c].
        off: the bound of the spectral norm of R, the largest of all groups, [query].
    """

    pairs: int
    row: Tensor
    column: Tensor
    off: Tensor

    @classmethod
    def of(cls, matrices: Tensor, pairs: int) -> RoughBlock:
        """Of queries' matrices [query, groups, a, b]."""
        row, column, off = _approximated(matrices)
        row, column = (own.permute(1, 2, 0, 3).flatten(2) for own in (row, column))
        return cls(pairs, row, column, off)

    @property
    def numbers(self) -> tuple[int, int]:
        """Stored ones of u, and of v."""
        rows, columns = (own.shape[0] * own.shape[1] for own in (self.row, self.column))
        return rows * self.pairs, columns * self.pairs

    def products(self, u: Tensor, v: Tensor) -> Tensor:
        """Of stored numbers [row, *] with the queries, [query, row]."""
        turned = [
            self._turned(numbers, directions)
            for numbers, directions in ((u, self.row), (v, self.column))
        ]
        return turned[0].mul_(turned[1]).unflatten(-1, (len(self.off), -1)).sum((0, 1, 4)).T

    def _turned(self, numbers: Tensor, directions: Tensor) -> Tensor:
        """[groups, pair, row, query * c]."""
        groups = len(directions)
        if groups == self.pairs == 1:  # bmm takes twice as long for one matrix
            return torch.mm(numbers, directions[0])[None, None]
        own = numbers.view(len(numbers), groups, -1, self.pairs).permute(1, 3, 0, 2)
        return own @ directions[:, None]

    def largest(self, number: float) -> Tensor:
        """The bound for rows without a number beyond this one, [query]."""
        rows, columns = self.numbers
        return self.off * (number**2 * (rows * columns) ** 0.5)

    def bound(self, u: Tensor, v: Tensor) -> Tensor:
        """The bound for each of some rows, [query, row]."""
        sizes = torch.linalg.vector_norm(u, dim=1) * torch.linalg.vector_norm(v, dim=1)
        return self.off[:, None] * sizes


@dataclass(frozen=True)
class RoughPairs:
    """The sum over layers; see the top of the file."""

    blocks: Sequence[RoughBlock]

    def products(self, stored: Tensor) -> Tensor:
        """About what the compression's ``dot`` gives for the queries, [query, row]."""
        parts = [own.products(u, v) for own, u, v in self._cut(stored)]
        return torch.stack(parts).sum(0)

    def largest(self, number: float) -> Tensor:
        """How much they are off at most, in rows without a number beyond this one, [query]."""
        return torch.stack([own.largest(number) for own in self.blocks]).sum(0)

    def bound(self, stored: Tensor) -> Tensor:
        """How much they are off at most in each of some rows, [query, row]."""
        return torch.stack([own.bound(u, v) for own, u, v in self._cut(stored)]).sum(0)

    def _cut(self, stored: Tensor) -> list[tuple[RoughBlock, Tensor, Tensor]]:
        sizes = [size for own in self.blocks for size in own.numbers]
        parts = stored.split(sizes, dim=1)
        return list(zip(self.blocks, parts[::2], parts[1::2], strict=True))


def _approximated(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P and W [query, groups, *, c] of matrices [query, groups, a, b], and the bound of what is
    left [query], by a randomised range finder (Halko, Martinsson and Tropp 2011)."""
    if matrices.shape[2] > matrices.shape[3]:
        column, row, off = _approximated(matrices.mT)
        return row, column, off
    # Of one size: fourth powers of a small gradient's numbers would be zero.
    size = matrices.abs().amax((2, 3), keepdim=True)
    matrices = matrices / torch.where(size > 0, size, 1.0)
    count = min(RANK, matrices.shape[2])
    generator = torch.Generator().manual_seed(0)
    spanned = matrices @ torch.randn(matrices.shape[3], count, generator=generator).to(matrices)
    for _ in range(_ROUNDS):
        spanned = matrices @ (matrices.mT @ torch.linalg.qr(spanned)[0])
    row = torch.linalg.qr(spanned)[0]
    column = matrices.mT @ row
    rest = matrices - row @ column.mT
    # The largest singular value is at most the root of the sum of all squares, of all fourth
    # powers, ...: of eighth powers it is hardly more.
    squares = rest @ rest.mT
    spectral = torch.linalg.matrix_norm(squares @ squares) ** 0.25
    rounding = _ROUNDING * torch.finfo(matrices.dtype).eps * torch.linalg.matrix_norm(matrices)
    return row, column * size, ((spectral + rounding) * size[..., 0, 0]).amax(1)
