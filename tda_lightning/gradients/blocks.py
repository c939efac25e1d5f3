"""Blocks: the parameters that share one block of curvature, seen as a stack of matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """A weight and its bias as matrices ``[groups, rows, columns]``.

    A linear layer is one matrix [out, in + 1] with the bias as its last column; a grouped
    convolution is one matrix per group; an embedding is [vocabulary, dimension]; the weight and
    bias of a norm are one row of both. Joining weight and bias is worth a lot in fidelity
    (docs/methods.md, "EK-FAC": LDS 0.93 against 0.60 on a tanh MLP).

    Attributes:
        name: the weight's name without ``.weight``, or the parameter's own name.
        parameters: names, weight first.
        shapes: their shapes.
        groups: number of matrices stacked.
        bias_column: True when the last parameter is the last column.
        row: True when all parameters lie end to end in one row.
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    groups: int = 1
    bias_column: bool = False
    row: bool = False

    @property
    def size(self) -> int:
        """Number of scalar parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[groups, rows, columns]."""
        if self.row:
            return (1, 1, self.size)
        rows = self.shapes[0][0] // self.groups
        return (self.groups, rows, self.size // (self.groups * rows))

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors of the parameters' shapes, any leading axes -> [..., groups, rows, columns]."""
        parts = []
        for name, shape in zip(self.parameters, self.shapes, strict=True):
            tensor = tensors[name]
            lead = tensor.shape[: tensor.dim() - len(shape)]
            target = (1, 1, -1) if self.row else (self.groups, self.shape[1], -1)
            parts.append(tensor.reshape((*lead, *target)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`matrix`."""
        lead = matrix.shape[:-3]
        scale = 1 if self.row else self.groups * self.shape[1]
        widths = [math.prod(shape) // scale for shape in self.shapes]
        parts = matrix.split(widths, dim=-1)
        return {
            name: part.reshape((*lead, *shape))
            for name, shape, part in zip(self.parameters, self.shapes, parts, strict=True)
        }


def block_name(parameter: str) -> str:
    return parameter.removesuffix(".weight")
