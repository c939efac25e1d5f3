"""Orthogonal bases of one side of a block, held dense or, for a wide side, as reflections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reflections:
    r"""An orthogonal matrix that differs from the identity by a product of few reflections.

    .. math::
        Q = I - W T W^\top

    the compact WY form: products with Q cost O(width x rank) and Q is never formed. Columns of Q
    are the basis vectors.

    Attributes:
        vectors: W, [groups, width, rank].
        core: T, [groups, rank, rank].

    References:
        | A storage-efficient WY representation for products of Householder transformations
          (Schreiber & Van Loan, 1989)
    """

    vectors: Tensor
    core: Tensor

    @property
    def rank(self) -> int:
        """Number of reflections."""
        return self.vectors.shape[-1]

    def turn(self, rows: Tensor) -> Tensor:
        """rows @ Q for rows [..., groups, count, width]: their coordinates."""
        return rows - ((rows @ self.vectors) @ self.core) @ self.vectors.transpose(-1, -2)

    def turn_columns(self, columns: Tensor) -> Tensor:
        """Q^T @ columns for columns [..., groups, width, count]."""
        inner = self.vectors.transpose(-1, -2) @ columns
        return columns - self.vectors @ (self.core.transpose(-1, -2) @ inner)

    def inverse(self) -> Reflections:
        """Q^T, which turns coordinates back."""
        return Reflections(self.vectors, self.core.transpose(-1, -2))

    def diagonal(self, columns: Tensor) -> Tensor:
        """(Q * Q)^T @ columns: the diagonals of Q^T diag(c) Q for columns [..., groups, width, k].

        Never dense: either each column by the small matrix P^T diag(c) P with P = W T, or Q by
        chunks of its rows, whichever takes fewer operations.
        """
        if bool((columns == columns[..., :1, :]).all()):
            return columns  # a multiple of the identity is the same in every basis
        width, rank, count = *self.vectors.shape[-2:], columns.shape[-1]
        products = self.vectors @ self.core
        if 2 * count * rank**2 < width * (rank + count):
            own = (products * self.vectors).sum(-1, keepdim=True)
            parts = []
            for column in columns.split(1, dim=-1):
                inner = products.transpose(-1, -2) @ (products * column)
                spread = ((self.vectors @ inner) * self.vectors).sum(-1, keepdim=True)
                parts.append((1 - 2 * own) * column + spread)
            return torch.cat(parts, dim=-1)
        total = torch.zeros_like(columns)
        for start in range(0, width, rank):
            rows = slice(start, min(start + rank, width))
            block = -products[:, rows] @ self.vectors.transpose(-1, -2)
            block[:, :, rows].diagonal(dim1=-2, dim2=-1).add_(1)
            total += block.square().transpose(-1, -2) @ columns[..., rows, :]
        return total

    def to(self, device: torch.device, dtype: torch.dtype) -> Reflections:
        """The same matrix in another place."""
        return Reflections(self.vectors.to(device, dtype), self.core.to(device, dtype))


# Columns are basis vectors: dense [groups, width, width], or reflections; None: the identity.
Basis: TypeAlias = Tensor | Reflections | None


def turned(rows: Tensor, basis: Basis) -> Tensor:
    """rows @ basis: coordinates of rows [..., groups, count, width]."""
    if basis is None:
        return rows
    return basis.turn(rows) if isinstance(basis, Reflections) else rows @ basis


def between(first: Basis, second: Basis, count: int) -> list[Basis]:
    """Bases by which ``count`` rows of coordinates in ``first`` are turned, one after the other, to
    those in ``second``: their product where it takes fewer operations."""
    if first is second:
        return []
    if isinstance(first, Tensor) and isinstance(second, Tensor) and count >= first.shape[-1]:
        return [first.mT @ second]
    return [basis for basis in (inverse(first), second) if basis is not None]


def matmul_sides(left: Basis, matrix: Tensor, right: Basis) -> Tensor:
    """left^T @ matrix @ right: coordinates of matrix [..., groups, rows, columns]."""
    if isinstance(left, Reflections):
        matrix = left.turn_columns(matrix)
    elif left is not None:
        matrix = left.transpose(-1, -2) @ matrix
    return turned(matrix, right)


def inverse(basis: Basis) -> Basis:
    """The transpose, which turns coordinates back."""
    if isinstance(basis, Reflections):
        return basis.inverse()
    return None if basis is None else basis.transpose(-1, -2)


def diagonal_in(left: Basis, diagonal: Tensor, right: Basis) -> Tensor:
    """Diagonal, in the basis left (x) right, of a matrix that is diagonal [..., groups, rows,
    columns] in the parameters."""
    for basis in (left, right):
        if isinstance(basis, Reflections):
            diagonal = basis.diagonal(diagonal)
        elif basis is not None:
            diagonal = basis.square().transpose(-1, -2) @ diagonal
        diagonal = diagonal.transpose(-1, -2)  # twice: the right side's turn, then back
    return diagonal


def turning_cost(basis: Basis, width: int) -> int:
    """Multiplications per number that turning a side of ``width`` takes."""
    if basis is None:
        return 0
    return 2 * basis.rank if isinstance(basis, Reflections) else width


def placed(basis: Basis, device: torch.device, dtype: torch.dtype) -> Basis:
    """The basis on ``device`` in ``dtype``."""
    return None if basis is None else basis.to(device, dtype)
