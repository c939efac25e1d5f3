"""Per-example gradients made of others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tda_lightning.gradients.forms import Dense, Gradient, Outer
from tda_lightning.gradients.rows import Rows


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

    def weighted_sums(self, weights: Tensor) -> Tensor:
        return torch.stack([term.weighted_sums(weights) for term in self.terms]).sum(0)

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
        sums = [block.weighted_sums(weights).flatten(1) for block in self.blocks]
        return torch.cat(sums, dim=1)[:, None, None]


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

    def weighted_sums(self, weights: Tensor) -> Tensor:
        return self.gradient.weighted_sums(weights) * self.scale


def scaled(gradient: Gradient, scale: Tensor | None) -> Gradient:
    """``gradient`` times ``scale``, staying factored where the form allows it."""
    if scale is None:
        return gradient
    if isinstance(gradient, Rows):
        return gradient.with_values(gradient.values * scale[0, gradient.index])
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
        return gradient.with_values(gradient.values * factors[gradient.example, None])
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
