r"""Factor pairs: of each layer's gradient the leading singular vectors, in directions that matter.

A layer's gradient is a sum of outer products, one for each position, so it takes far fewer numbers
than a matrix has. In balanced directions (``sides.py``) of both sides it is a matrix [a, b], of
which c pairs of vectors are kept, the best of that rank (LoRIF, Li et al. 2026, does so after a
random projection of both sides). The terms of training stand below one another and share the
column side: a layer's inputs change little from one checkpoint to the next, and those of the first
layer not at all.

.. math::
    s_{qn} \approx \frac1N \sum_{\text{layers}} \sum_{k \le c} u_{nk}^\top Q_q v_{nk}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tda_lightning.gradients import Gradient
from tda_lightning.index.directions import Grid, response_coordinates
from tda_lightning.index.matrices import BlockMatrices, Matrices
from tda_lightning.index.rough_pairs import RANK, RoughBlock, RoughPairs

_PARTS = ("left", "left_responses", "right", "right_responses", "row_scale", "column_scale")


@dataclass(frozen=True)
class FactoredBlock:
    """Directions of a block, whose gradients are kept as pairs of vectors.

    Attributes:
        left: for gradients, of the row side in each term, [groups, rows, a]; a may be 0.
        left_responses: the same for responses.
        right: for gradients, of the column side, [groups, columns, b].
        right_responses: the same for responses.
        rank: c.
        row_scale: what u is divided by, [groups, sum of a].
        column_scale: what v is divided by, [groups, b].
    """

    left: tuple[Tensor, ...]
    left_responses: tuple[Tensor, ...]
    right: Tensor
    right_responses: Tensor
    rank: int
    row_scale: Tensor
    column_scale: Tensor

    @property
    def heights(self) -> list[int]:
        """a of each term."""
        return [own.shape[-1] for own in self.left]

    @property
    def wide(self) -> bool:
        """Whether v is longer than u."""
        return self.column_scale.shape[1] > self.row_scale.shape[1]

    @property
    def width(self) -> int:
        """Numbers of a pair of vectors, times c."""
        return self.rank * (self.row_scale.numel() + self.column_scale.numel())

    def __post_init__(self) -> None:
        groups, width = self.column_scale.shape
        fits = (
            [own.shape for own in self.left] == [own.shape for own in self.left_responses]
            and self.right.shape == self.right_responses.shape
            and self.right.shape[::2] == (groups, width)
            and all(own.shape[0] == groups for own in self.left)
            and self.row_scale.shape == (groups, sum(self.heights))
        )
        if not fits or not 1 <= self.rank <= min(width, sum(self.heights)):
            raise ValueError(f"directions that do not belong together, {self.heights} and {width}")

    def grid(self, term: int) -> Grid:
        """The coordinates of a term."""
        return Grid(
            (self.left[term], self.right), (self.left_responses[term], self.right_responses), None
        )


@dataclass(frozen=True)
class FactorPairs:
    """See the top of the file; ``fit_factors.py`` makes it.

    Attributes:
        blocks: by name, in the order of names: that of a file's.
    """

    blocks: Mapping[str, FactoredBlock]
    kind: ClassVar[str] = "factors"
    degree: ClassVar[int] = 2

    @property
    def width(self) -> int:
        """How many numbers are stored of an example."""
        return sum(own.width for own in self.blocks.values())

    def coordinates(self, term: int, gradients: Mapping[str, Gradient]) -> BlockMatrices:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return BlockMatrices(
            {
                name: Matrices.of(gradients[name], own.left[term], own.right)
                for name, own in self.blocks.items()
                if own.heights[term]
            }
        )

    def response_coordinates(self, term: int, responses: Mapping[str, Tensor]) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        chosen = {name: own for name, own in self.blocks.items() if own.heights[term]}
        return response_coordinates(
            {name: own.grid(term) for name, own in chosen.items()}, responses
        )

    def stored(self, coordinates: Sequence[BlockMatrices]) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        parts = []
        for name, own in self.blocks.items():
            u, v = self.stacked(name, coordinates).leading(own.rank)
            parts += [u.div_(own.row_scale[..., None]), v.div_(own.column_scale[..., None])]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def stacked(self, name: str, coordinates: Sequence[BlockMatrices]) -> Matrices:
        """The matrices of a block with these coordinates, term below term."""
        return Matrices.stacked([own.blocks[name] for own in coordinates if name in own.blocks])

    def asked(self, coordinates: Tensor) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        parts = []
        for name, matrices in self.matrices(coordinates):
            own = self.blocks[name]
            scaled = matrices * own.row_scale[..., None] * own.column_scale[..., None, :]
            parts.append((scaled.mT if own.wide else scaled).flatten(1))
        return torch.cat(parts, dim=1)

    def dot(self, asked: Tensor, stored: Tensor) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        total = asked.new_zeros(len(asked), len(stored))
        column = 0
        for own, matrices in self._asked_of(asked):
            (groups, height), width, rank = own.row_scale.shape, own.column_scale.shape[1], own.rank
            u, v = stored[:, column : column + own.width].split(
                [groups * height * rank, groups * width * rank], dim=1
            )
            column += own.width
            # [groups, rank, batch, a] and [groups, rank, batch, b]
            u, v = (part.view(len(stored), groups, -1, rank).permute(1, 3, 0, 2) for part in (u, v))
            # The product with the matrix has the shorter of the two.
            first, second = (v, u) if own.wide else (u, v)
            first, second = first.flatten(1, 2), second.flatten(1, 2)
            for query, matrix in enumerate(matrices):
                if groups == 1:  # bmm takes twice as long for one matrix
                    products = torch.mm(first[0], matrix[0]).mul_(second[0]).sum(1)
                else:
                    products = torch.bmm(first, matrix).mul_(second).sum((0, 2))
                total[query] += products.view(rank, -1).sum(0)
        return total

    def rough(self, asked: Tensor) -> RoughPairs | None:
        """See :class:`~tda_lightning.index.compression.Compression`. None where layers are so small
        that it would be more than half the work."""
        full, less = 0, 0
        for own in self.blocks.values():
            (groups, height), width = own.row_scale.shape, own.column_scale.shape[1]
            full += groups * own.rank * height * width
            less += groups * own.rank * (height + width) * min(RANK, height, width)
        if 2 * less > full:
            return None
        return RoughPairs(
            [
                RoughBlock.of(matrices.mT if own.wide else matrices, own.rank)
                for own, matrices in self._asked_of(asked)
            ]
        )

    def _asked_of(self, asked: Tensor) -> Iterator[tuple[FactoredBlock, Tensor]]:
        """Each block with what :meth:`asked` has of it: [query, groups, a, b], or [query, groups,
        b, a] where v is longer than u."""
        before = 0
        for own in self.blocks.values():
            (groups, height), width = own.row_scale.shape, own.column_scale.shape[1]
            size = groups * height * width
            shape = (groups, width, height) if own.wide else (groups, height, width)
            yield own, asked[:, before : before + size].unflatten(1, shape)
            before += size

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        found: dict[str, Tensor] = {}
        for name, own in self.blocks.items():
            for part in _PARTS:
                tensors = getattr(own, part)
                several = enumerate(tensors) if isinstance(tensors, tuple) else [(0, tensors)]
                found |= {f"{term} {part} {name}": tensor for term, tensor in several}
            found[f"0 rank {name}"] = torch.tensor(own.rank)
        return found

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> FactorPairs:
        """What :meth:`tensors` were of.

        Raises:
            ValueError: they do not belong together.
        """
        parts: dict[str, dict[str, dict[int, Tensor]]] = {}
        for key, tensor in tensors.items():
            term, part, name = key.split(" ", 2)
            parts.setdefault(name, {}).setdefault(part, {})[int(term)] = tensor
        blocks = {}
        for name, own in sorted(parts.items()):
            left, answers = (
                tuple(own[part][term] for term in range(len(own[part])))
                for part in ("left", "left_responses")
            )
            alone = {part: own[part][0] for part in _PARTS[2:]}
            blocks[name] = FactoredBlock(left, answers, rank=int(own["rank"][0]), **alone)
        return cls(blocks)

    def to(self, device: torch.device, dtype: torch.dtype) -> FactorPairs:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        placed = {
            name: own.to(device, dtype) if own.is_floating_point() else own
            for name, own in self.tensors().items()
        }
        return self.restored(placed)

    def matrices(self, coordinates: Tensor) -> list[tuple[str, Tensor]]:
        """The coordinates of queries as matrices [query, groups, sum of a, b], by block."""
        by_block: dict[str, list[Tensor]] = {name: [] for name in self.blocks}
        terms = len(next(iter(self.blocks.values())).left)
        before = 0
        for term in range(terms):
            for name, own in self.blocks.items():
                groups, width = own.column_scale.shape
                if not (height := own.heights[term]):
                    continue
                size = groups * height * width
                part = coordinates[:, before : before + size]
                by_block[name].append(part.unflatten(1, (groups, height, width)))
                before += size
        return [(name, torch.cat(parts, dim=2)) for name, parts in by_block.items()]
