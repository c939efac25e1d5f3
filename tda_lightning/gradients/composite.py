"""Per-example gradients that touch few rows, and gradients made of others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tda_lightning.gradients import forms
from tda_lightning.gradients.basis import Basis, turned
from tda_lightning.gradients.forms import Dense, Gradient, Outer
from tda_lightning.gradients.moments import SideForm


class Rows(Gradient):
    """Gradients that touch few rows (an embedding): row ``index[k]`` of example ``example[k]``
    is ``values[k]``, each pair at most once."""

    factored = True

    def __init__(self, example: Tensor, index: Tensor, values: Tensor, batch: int, height: int):
        keys, inverse = torch.unique(example * height + index, return_inverse=True)
        merged = values.new_zeros(len(keys), values.shape[-1]).index_add_(0, inverse, values)
        self.example, self.index, self.values = keys // height, keys % height, merged
        self.shape = (batch, 1, height, values.shape[-1])

    def dense(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.batch)
        inside = (self.example >= start) & (self.example < stop)
        out = self.values.new_zeros(stop - start, *self.shape[1:])
        out[self.example[inside] - start, 0, self.index[inside]] = self.values[inside]
        return out

    def covariances(
        self, sides: tuple[SideForm, SideForm], weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = self.values
        own = values.new_ones(len(self.index)) if weights is None else weights[self.example]
        counts = values.new_zeros(self.shape[2]).index_add_(0, self.index, own)
        values = values if weights is None else values * own.sqrt()[:, None]
        return counts[None], sides[1].moment(values[:, None, None]), counts.sum()[None]

    def sum_of_squares(self, left: Basis, right: Basis) -> Tensor:
        if left is not None:
            return super().sum_of_squares(left, right)
        values = turned(self.values[None], right)[0]
        return values.new_zeros(self.shape[1:]).index_add_(1, self.index, values.square()[None])

    def weighted_squares(self, left: Basis, right: Basis, weight: Tensor | None) -> Tensor:
        if left is not None:
            return super().weighted_squares(left, right, weight)
        values = turned(self.values[None], right)[0]
        squares = values.square()
        if weight is not None:
            squares = squares * weight[0, self.index]
        return values.new_zeros(self.batch).index_add_(0, self.example, squares.sum(-1))

    def dot(self, queries: Tensor) -> Tensor:
        out = queries.new_zeros(len(queries), self.batch)
        step = max(1, forms.CHUNK_SCALARS // (len(queries) * self.shape[3]))
        for start in range(0, len(self.index), step):
            part = slice(start, start + step)
            products = torch.einsum(
                "qkd,kd->qk", queries[:, 0, self.index[part]], self.values[part]
            )
            out.index_add_(1, self.example[part], products)
        return out

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        out = left.new_zeros(self.batch, left.shape[-1])
        step = max(1, forms.CHUNK_SCALARS // (2 * left.shape[-1]))
        for start in range(0, len(self.index), step):
            part = slice(start, start + step)
            products = (self.values[part] @ right[0]) * left[0, self.index[part]]
            out.index_add_(0, self.example[part], products)
        return out


class Sum(Gradient):
    """Sum of forms that cannot be merged (a tied embedding and output head)."""

    def __init__(self, terms: Sequence[Gradient]):
        self.terms = terms
        self.shape = terms[0].shape

    @property
    def cost_per_example(self) -> int:
        return sum(term.cost_per_example for term in self.terms)

    def dense(self, rows: slice) -> Tensor:
        return torch.stack([term.dense(rows) for term in self.terms]).sum(0)

    def dot(self, queries: Tensor) -> Tensor:
        return torch.stack([term.dot(queries) for term in self.terms]).sum(0)

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.stack([term.bilinear(left, right) for term in self.terms]).sum(0)


class Joined(Gradient):
    """The gradients of several blocks end to end in one row: [batch, 1, 1, all parameters]."""

    def __init__(self, blocks: Sequence[Gradient]):
        self.blocks = blocks
        self.widths = [math.prod(block.shape[1:]) for block in blocks]
        self.shape = (blocks[0].batch, 1, 1, sum(self.widths))

    @property
    def cost_per_example(self) -> int:
        return sum(block.cost_per_example for block in self.blocks) + self.shape[3]

    def dense(self, rows: slice) -> Tensor:
        parts = [block.dense(rows).flatten(1) for block in self.blocks]
        return torch.cat(parts, dim=1)[:, None, None]

    def dot(self, queries: Tensor) -> Tensor:
        parts = queries.flatten(1).split(self.widths, dim=1)
        own = [
            block.dot(part.unflatten(1, block.shape[1:]))
            for block, part in zip(self.blocks, parts, strict=True)
        ]
        return torch.stack(own).sum(0)

    def weighted_sums(self, weights: Tensor) -> Tensor:
        parts = [block.weighted_sums(weights).flatten(1) for block in self.blocks]
        return torch.cat(parts, dim=1)[:, None, None]


class Scaled(Gradient):
    """Gradients multiplied elementwise by ``scale`` [groups, rows, columns]: h * g, the
    preconditioned gradient (docs/methods.md, "SOURCE for Adam")."""

    def __init__(self, gradient: Gradient, scale: Tensor):
        self.gradient, self.scale = gradient, scale
        self.shape = gradient.shape

    @property
    def cost_per_example(self) -> int:
        return self.gradient.cost_per_example

    def dense(self, rows: slice) -> Tensor:
        return self.gradient.dense(rows) * self.scale

    def dot(self, queries: Tensor) -> Tensor:
        return self.gradient.dot(queries * self.scale)


def scaled(gradient: Gradient, scale: Tensor | None) -> Gradient:
    """``gradient`` times ``scale``, staying factored where the form allows it."""
    if scale is None:
        return gradient
    if isinstance(gradient, Rows):
        out = Rows.__new__(Rows)
        out.example, out.index, out.shape = gradient.example, gradient.index, gradient.shape
        out.values = gradient.values * scale[0, gradient.index]
        return out
    if isinstance(gradient, Outer) and bool((scale == scale.flatten()[0]).all()):
        outputs = gradient.outputs * scale.flatten()[0]
        return Outer(gradient.inputs, outputs, gradient.shape[3], gradient.filled)
    return Scaled(gradient, scale)


class ExampleScaled(Gradient):
    """Gradients of examples, each multiplied by its factor."""

    def __init__(self, gradient: Gradient, factors: Tensor):
        self.gradient, self.factors = gradient, factors
        self.shape = gradient.shape

    @property
    def cost_per_example(self) -> int:
        return self.gradient.cost_per_example

    def dense(self, rows: slice) -> Tensor:
        return self.gradient.dense(rows) * self.factors[rows, None, None, None]


def example_scaled(gradient: Gradient, factors: Tensor) -> Gradient:
    """``gradient`` with each example's times its factor [batch], staying factored where the form
    allows it."""
    if isinstance(gradient, Rows):
        out = Rows.__new__(Rows)
        out.example, out.index, out.shape = gradient.example, gradient.index, gradient.shape
        out.values = gradient.values * factors[gradient.example, None]
        return out
    if isinstance(gradient, Outer):
        outputs = gradient.outputs * factors[:, None, None, None]
        return Outer(gradient.inputs, outputs, gradient.shape[3], gradient.filled)
    return ExampleScaled(gradient, factors)


def first_examples(gradient: Gradient, count: int) -> Gradient:
    """The gradients of the first ``count`` examples, in the form that they have."""
    count = min(count, gradient.batch)
    if count == gradient.batch:
        return gradient
    if isinstance(gradient, Outer):
        inputs = gradient.inputs
        return Outer(
            lambda rows: inputs(slice(*rows.indices(count))),
            gradient.outputs[:count],
            gradient.shape[3],
            None if gradient.filled is None else gradient.filled[:count],
        )
    if isinstance(gradient, Rows):
        own = gradient.example < count
        parts = (gradient.example[own], gradient.index[own], gradient.values[own])
        return Rows(*parts, count, gradient.shape[2])
    if isinstance(gradient, Sum):
        return Sum([first_examples(term, count) for term in gradient.terms])
    return Dense(gradient.dense(slice(0, count)))
