"""Which entries of a layer's output belong to which example.

Most layers see [batch, ...], but not all: recurrent layers and ``nn.MultiheadAttention`` default
to [time, batch, ...], and many models merge batch and time into one axis. Others sort examples,
leave padding out, or hand some examples to each expert: then it is known row by row.

The *rows* of a layer's output are its vectors along the channel axes, in the order of the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Axis ``axis`` holds the examples: ``whole`` (its size is the batch), ``major`` (batch x
    positions merged, example by example) or ``minor`` (positions x batch)."""

    axis: int
    order: str

    def batch_first(self, tensor: Tensor, batch: int) -> Tensor:
        """A view or copy with the example axis in front."""
        if self.order == "whole":
            return tensor.movedim(self.axis, 0)
        if self.order == "major":
            return tensor.unflatten(self.axis, (batch, -1)).movedim(self.axis, 0)
        return tensor.unflatten(self.axis, (-1, batch)).movedim(self.axis + 1, 0)


def candidates(shape: torch.Size, batch: int, channel_axes: tuple[int, ...]) -> list[Layout]:
    """Every layout that ``shape`` admits for ``batch`` examples."""
    excluded = {axis % len(shape) for axis in channel_axes}
    layouts = []
    for axis, size in enumerate(shape):
        if axis in excluded:
            continue
        if size == batch:
            layouts.append(Layout(axis, "whole"))
        elif size % batch == 0 and size > 0:
            layouts += [Layout(axis, "major"), Layout(axis, "minor")]
    return layouts


def owners(layout: Layout, shape: torch.Size, batch: int, channel_axes: tuple[int, ...]) -> Tensor:
    """The example that each row of an output of ``shape`` belongs to: [rows]."""
    excluded = {axis % len(shape) for axis in channel_axes}
    kept = [axis for axis in range(len(shape)) if axis not in excluded]
    size = shape[layout.axis]
    place = torch.arange(size)
    if layout.order == "major":
        place = place // (size // batch)
    elif layout.order == "minor":
        place = place % batch
    others = [1] * len(kept)
    others[kept.index(layout.axis)] = size
    return place.view(others).expand([shape[axis] for axis in kept]).flatten()


class RowOwners:
    """The example of every row, one by one; examples may have different numbers of rows, or none.

    Args:
        owner: [rows], -1 for a row of no example.
    """

    def __init__(self, owner: Tensor):
        self.owner = owner

    def batch_first(self, tensor: Tensor, batch: int) -> Tensor:
        """[batch, most rows of an example, ...] from [*row axes, ...]; zero where there is none.

        The row axes come first, as many as hold one entry per owner.
        """
        index, used = self._places(batch)
        lead = _leading(tensor.shape, len(self.owner))
        rows = tensor.reshape(len(self.owner), *tensor.shape[lead:])
        if not bool(used.any()):
            return rows.new_zeros(*used.shape, *rows.shape[1:])
        picked = rows[index]
        if bool(used.all()):
            return picked
        return picked.masked_fill(~used.view(*used.shape, *[1] * (picked.dim() - 2)), 0)

    def used(self, batch: int) -> Tensor:
        """Whether :meth:`batch_first` holds a row there: [batch, most rows]."""
        return self._places(batch)[1]

    def _places(self, batch: int) -> tuple[Tensor, Tensor]:
        owned = (self.owner >= 0).nonzero().squeeze(1)
        order = owned[self.owner[owned].argsort(stable=True)]
        counts = torch.bincount(self.owner[owned], minlength=batch)
        place = torch.arange(max(1, int(counts.max())), device=counts.device)
        index = (counts.cumsum(0) - counts)[:, None] + place
        used = place < counts[:, None]
        return order[index.clamp(max=len(order) - 1)] if len(order) else index, used


def _leading(shape: torch.Size, rows: int) -> int:
    """How many leading axes of ``shape`` hold ``rows`` entries together."""
    for axes in range(len(shape) + 1):
        if math.prod(shape[:axes]) == rows:
            return axes
    raise AssertionError(f"no {rows} rows in a tensor of shape {list(shape)}")
