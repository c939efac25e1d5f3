"""Which entries of a layer's output belong to which example.

Most layers see [batch, ...], but not all: recurrent layers and ``nn.MultiheadAttention`` default
to [time, batch, ...], and many models merge batch and time into one axis.
"""

from __future__ import annotations

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


def consistent(layout: Layout, gradient: Tensor, example: int, batch: int) -> bool:
    """Whether the gradient of one example's loss lies within that example's entries."""
    rows = layout.batch_first(gradient, batch)
    others = torch.arange(batch, device=gradient.device) != example
    return not bool(rows[others].any())
