"""Experts: a stack of matrices in one parameter, of which each row of inputs meets one.

It is a linear layer for each expert, whose rows are tokens of several examples, and a block of as
many matrices. ``parameter_views.py`` has the ways in which models multiply with one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.gradients.blocks import BlockParts
from tda_lightning.gradients.layout import RowOwners, owners
from tda_lightning.gradients.uses import MatrixProduct, Storage, Use


@dataclass(eq=False)
class Experts(MatrixProduct):
    """Row s of the inputs times matrix ``expert[s]`` of the weight [experts, out, in].

    Attributes:
        inputs: [rows, in].
        expert: int64 [rows].
        count: number of experts.
        stored_transposed: whether the weight is stored as [experts, in, out].
        channels: axes of the output that are not rows.
    """

    inputs: Tensor
    expert: Tensor
    count: int
    stored_transposed: bool
    channels: tuple[int, ...] = (-1,)

    @property
    def channel_axes(self) -> tuple[int, ...]:
        return self.channels

    @property
    def storage(self) -> Storage:
        return Storage(self.count, self.stored_transposed)

    def by_row(self) -> Use:
        assert self.gradient is not None
        return self.same(self.rows(self.gradient), channels=(-1,))

    def _places(self, batch: int) -> tuple[Tensor, Tensor, int]:
        """Of each row that belongs to an example: its number, its place among (example, expert,
        position) as one index, and the number of positions."""
        if isinstance(self.layout, RowOwners):
            owner = self.layout.owner
        else:
            assert self.layout is not None
            owner = owners(self.layout, self.output_shape, batch, self.channel_axes)
        owner = owner.to(self.expert.device)
        rows = (owner >= 0).nonzero().squeeze(1)
        cell = owner[rows] * self.count + self.expert[rows]
        order = cell.argsort(stable=True)
        rows, cell = rows[order], cell[order]
        counts = torch.bincount(cell, minlength=batch * self.count)
        position = torch.arange(len(cell), device=cell.device) - (counts.cumsum(0) - counts)[cell]
        positions = max(1, int(counts.max()))
        return rows, cell * positions + position, positions

    def _spread(self, values: Tensor, batch: int) -> Tensor:
        """[rows, width] -> [batch, experts, positions, width], zero where there is no row."""
        rows, places, positions = self._places(batch)
        out = values.new_zeros(batch * self.count * positions, values.shape[1])
        out[places] = values[rows]
        return out.view(batch, self.count, positions, -1)

    def used(self, batch: int) -> Tensor | None:
        return self._spread(self.inputs.new_ones(len(self.inputs), 1), batch).squeeze(-1) > 0

    def outputs(self, batch: int) -> Tensor:
        assert self.gradient is not None
        return self._spread(self.rows(self.gradient), batch)

    def columns(self, batch: int, constant: float | None) -> Callable[[slice], Tensor]:
        assert constant is None
        return self._spread(self.inputs, batch).__getitem__

    def add_to(self, parts: BlockParts, batch: int) -> None:
        assert self.weight is not None
        used = self.used(batch)
        assert used is not None
        outputs, columns = self.outputs(batch), self.columns(batch, None)
        parts.add_outer(self.weight.name, columns, outputs, used.sum(2))
