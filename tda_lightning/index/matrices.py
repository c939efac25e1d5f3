"""Matrices of a batch of examples, as products of two thin factors where that is less work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.gradients import Gradient, Outer, Rows

_ROUNDS = 4  # of subspace iteration
_NOISE = 100  # times the precision: what is left of a dependent column is rounding


@dataclass(frozen=True)
class Matrices:
    """Matrices [batch, groups, rows, columns], which are ``left @ right.mT``.

    The gradient of a layer is a sum of outer products, one for each position, so two thin factors
    hold it; sums over checkpoints have the factors side by side. They become one dense matrix where
    that has fewer numbers.

    Attributes:
        left: [batch, groups, rows, inner].
        right: [batch, groups, columns, inner]; None: the identity, and ``left`` the matrices.
    """

    left: Tensor
    right: Tensor | None

    @classmethod
    def of(cls, gradient: Gradient, left: Tensor | None, right: Tensor | None) -> Matrices:
        """left^T D_n right of gradients D, for directions [groups, width, count] of both sides;
        None: the axes."""
        _, _, rows, columns = gradient.shape
        rows = rows if left is None else left.shape[-1]
        columns = columns if right is None else right.shape[-1]
        if isinstance(gradient, Outer) and gradient.positions * (rows + columns) < rows * columns:
            turned = gradient.in_basis(left, right)
            chunks = gradient.chunks(gradient.positions * sum(gradient.shape[1:]))
            inputs = torch.cat([turned.inputs(part) for part in chunks])
            return cls(turned.outputs.mT, inputs.mT)
        if isinstance(gradient, Rows) and left is not None:
            return cls(*_of_rows(gradient, left, right)).cheapest()
        chunks = gradient.chunks()
        return cls(torch.cat([gradient.rotated(part, left, right) for part in chunks]), None)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[batch, groups, rows, columns]."""
        batch, groups, rows, inner = self.left.shape
        return batch, groups, rows, inner if self.right is None else self.right.shape[2]

    def dense(self) -> Tensor:
        """The matrices themselves."""
        return self.left if self.right is None else self.left @ self.right.mT

    def cheapest(self) -> Matrices:
        """The same, dense where that has fewer numbers."""
        _, _, rows, columns = self.shape
        if self.right is None or self.left.shape[3] * (rows + columns) < rows * columns:
            return self
        return Matrices(self.dense(), None)

    def __add__(self, other: Matrices) -> Matrices:
        if self.right is None or other.right is None:
            return Matrices(self.dense() + other.dense(), None)
        left = torch.cat([self.left, other.left], dim=3)
        return Matrices(left, torch.cat([self.right, other.right], dim=3)).cheapest()

    def __mul__(self, weights: Tensor) -> Matrices:
        """Times the weight of each example, [batch, 1]."""
        return Matrices(self.left * weights[..., None, None].to(self.left), self.right)

    @staticmethod
    def stacked(parts: Sequence[Matrices]) -> Matrices:
        """The parts below one another."""
        if len(parts) == 1:
            return parts[0]
        rights = [own.right for own in parts if own.right is not None]
        if len(rights) < len(parts):
            return Matrices(torch.cat([own.dense() for own in parts], dim=2), None)
        heights, inner = ([own.left.shape[axis] for own in parts] for axis in (2, 3))
        left = parts[0].left.new_zeros(*parts[0].left.shape[:2], sum(heights), sum(inner))
        row, column = 0, 0
        for own, height, width in zip(parts, heights, inner, strict=True):
            left[:, :, row : row + height, column : column + width] = own.left
            row, column = row + height, column + width
        return Matrices(left, torch.cat(rights, dim=3)).cheapest()

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """The pairs of leading singular vectors, each pair of one length: u [batch, groups, rows,
        rank] and v [batch, groups, columns, rank], so that u @ v.mT is about the matrices."""
        batch, groups, _, columns = self.shape
        if self.right is not None and self.left.shape[3] == 1:
            u, v = self.left, self.right
            sizes = [own.norm(dim=2, keepdim=True).clamp(min=_tiny(own)) for own in (u, v)]
            root = (sizes[1] / sizes[0]).sqrt()
            u, v = u * root, v / root
            if rank == 1:
                return u, v
            padding = (0, rank - 1)
            return torch.nn.functional.pad(u, padding), torch.nn.functional.pad(v, padding)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(groups, columns, rank, generator=generator)
        v = start.to(self.left).expand(batch, -1, -1, -1)
        for _ in range(_ROUNDS):
            u = _orthonormal(self.left @ (v if self.right is None else self.right.mT @ v))
            v = self.left.mT @ u
            v = v if self.right is None else self.right @ v
        root = v.norm(dim=2, keepdim=True).clamp(min=_tiny(v)).sqrt()
        return u * root, v / root


@dataclass(frozen=True)
class BlockMatrices:
    """Matrices of the same examples by block; sums and weights are those of every block."""

    blocks: Mapping[str, Matrices]

    def __add__(self, other: BlockMatrices) -> BlockMatrices:
        return BlockMatrices({name: own + other.blocks[name] for name, own in self.blocks.items()})

    def __mul__(self, weights: Tensor) -> BlockMatrices:
        return BlockMatrices({name: own * weights for name, own in self.blocks.items()})


def _of_rows(gradient: Rows, left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors of rows of an embedding: one column for each row that an example looked up."""
    batch, count = gradient.batch, len(gradient.example)
    looked_up = torch.bincount(gradient.example, minlength=batch)
    first = looked_up.cumsum(0) - looked_up
    place = torch.arange(count, device=first.device) - first[gradient.example]
    found = []
    own = gradient.values if right is None else gradient.values @ right[0]
    for values in (left[0, gradient.index], own):
        factor = values.new_zeros(batch, max(1, int(looked_up.max())), values.shape[1])
        factor[gradient.example, place] = values
        found.append(factor[:, None].mT)
    return found[0], found[1]


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of few columns [..., width, rank] that spans them, with zeros where a
    column depends on those before it: by Gram and Schmidt, which for many small matrices takes a
    fraction of a QR decomposition."""
    basis: list[Tensor] = []
    for column in columns.split(1, dim=-1):
        least = _NOISE * torch.finfo(column.dtype).eps * column.norm(dim=-2, keepdim=True)
        for _ in range(2 if basis else 0):  # twice is enough (Giraud et al. 2005)
            own = torch.cat(basis, dim=-1)
            column = column - own @ (own.mT @ column)
        size = column.norm(dim=-2, keepdim=True)
        basis.append(torch.where(size > least, column / size.clamp(min=_tiny(column)), 0.0))
    return torch.cat(basis, dim=-1)


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny
