"""Per-example gradients of one block, kept factored, and what is computed from them.

Every form offers the same few contractions; each does them the cheapest exact way its shape
allows, over chunks of examples that keep the working set small.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Working memory of one chunk of dense gradients, in scalars: large enough for efficient matrix
# products, small enough to stay out of the way of the model itself.
CHUNK_SCALARS = 1 << 24


def matmul_sides(left: Tensor | None, matrix: Tensor, right: Tensor | None) -> Tensor:
    """left^T @ matrix @ right with None for the identity, cheaper side first.

    Shapes: left [groups, rows, rows], matrix [..., groups, rows, columns], right
    [groups, columns, columns].
    """
    if left is not None:
        matrix = left.transpose(-1, -2) @ matrix
    if right is not None:
        matrix = matrix @ right
    return matrix


class Gradient(ABC):
    """Per-example gradients of one block: [batch, groups, rows, columns], not materialised."""

    shape: tuple[int, int, int, int]
    factored = False  # whether sides can be turned without forming the gradient

    @abstractmethod
    def dense(self, rows: slice) -> Tensor:
        """Gradients of the examples in ``rows``: [chunk, groups, rows, columns]."""

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def cost_per_example(self) -> int:
        """Scalars of working memory for one dense example."""
        return self.shape[1] * self.shape[2] * self.shape[3]

    def chunks(self, scalars_per_example: int | None = None) -> Iterator[slice]:
        per_example = max(1, scalars_per_example or self.cost_per_example)
        size = max(1, CHUNK_SCALARS // per_example)
        for start in range(0, self.batch, size):
            yield slice(start, min(start + size, self.batch))

    def rotated(self, rows: slice, left: Tensor | None, right: Tensor | None) -> Tensor:
        """left^T D_n right: coordinates in an eigenbasis, [chunk, groups, rows, columns]."""
        return matmul_sides(left, self.dense(rows), right)

    def in_basis(self, left: Tensor | None, right: Tensor | None) -> Gradient:
        """The gradients in the coordinates of an eigenbasis: left^T D_n right."""
        return Dense(torch.cat([self.rotated(rows, left, right) for rows in self.chunks()]))

    @property
    def rotation_cost(self) -> int:
        """Multiplications that :meth:`in_basis` takes for one example."""
        _, groups, rows, columns = self.shape
        return groups * rows * columns * (rows + columns)

    def covariances(self, full: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments of the two sides, summed over examples: (rows, columns, count).

        A side is [groups, width, width], or its diagonal [groups, width] where ``full`` is False
        or the side is one-hot. For a factored gradient these are the sums over positions of
        b b^T and a a^T (K-FAC expand, Eschenhagen et al. 2023) and their number; for a dense one
        sum D D^T, sum D^T D and their trace. Either way rows x columns / count is the Kronecker
        approximation of the summed Fisher.
        """
        left: Tensor | float = 0.0
        right: Tensor | float = 0.0
        for rows in self.chunks():
            dense = self.dense(rows)
            left = left + second_moment(dense.transpose(2, 3), full[0])
            right = right + second_moment(dense, full[1])
        assert isinstance(left, Tensor) and isinstance(right, Tensor)
        trace = right.diagonal(dim1=1, dim2=2).sum(-1) if full[1] else right.sum(-1)
        return left, right, trace

    def sum_of_squares(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Sum over examples of (left^T D_n right)^2: [groups, rows, columns]."""
        total = None
        for rows in self.chunks():
            part = self.rotated(rows, left, right).square().sum(0)
            total = part if total is None else total + part
        assert total is not None
        return total

    def weighted_squares(
        self, left: Tensor | None, right: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        """sum_ij weight_ij (left^T D_n right)_ij^2 of each example: [batch]."""
        parts = []
        for rows in self.chunks():
            squares = self.rotated(rows, left, right).square()
            squares = squares if weight is None else squares * weight
            parts.append(squares.flatten(1).sum(1))
        return torch.cat(parts)

    def dot(self, queries: Tensor) -> Tensor:
        """Inner products with dense queries [query, groups, rows, columns]: [query, batch]."""
        flat = queries.flatten(1)
        return torch.cat([flat @ self.dense(rows).flatten(1).T for rows in self.chunks()], dim=1)

    def weighted_sums(self, weights: Tensor) -> Tensor:
        """sum_n weights_kn D_n for weights [count, batch]: [count, groups, rows, columns]."""
        total = weights.new_zeros(len(weights), math.prod(self.shape[1:]))
        for rows in self.chunks():
            total.addmm_(weights[:, rows], self.dense(rows).flatten(1))
        return total.unflatten(1, self.shape[1:])

    def mean(self) -> Tensor:
        """Mean over the examples: [groups, rows, columns]."""
        total = torch.stack([self.dense(rows).sum(0) for rows in self.chunks()]).sum(0)
        return total / self.batch


def second_moment(samples: Tensor, full: bool) -> Tensor:
    """Sum of outer products of samples [chunk, groups, positions, width], by group, or only its
    diagonal."""
    if not full:
        return samples.square().sum((0, 2))
    # Copies, where needed at all, that run along the memory: transposing ones cost more than the
    # product.
    if samples.stride(3) == 1:
        flat = samples.transpose(0, 1).flatten(1, 2)
        return flat.transpose(1, 2) @ flat
    flat = samples.permute(1, 3, 0, 2).flatten(2)
    return flat @ flat.transpose(1, 2)


def _turned(samples: Tensor, basis: Tensor | None) -> Tensor:
    """samples @ basis for samples [chunk, groups, positions, width]; None for the identity."""
    if basis is None:
        return samples
    if samples.stride(3) != 1:  # transposed patches: one product for each example, no copy
        return samples @ basis
    # One product for each group: many thin ones would read the basis again for every example.
    flat = samples.transpose(0, 1).flatten(1, 2) @ basis
    return flat.unflatten(1, (samples.shape[0], samples.shape[2])).transpose(0, 1)


class Dense(Gradient):
    """Gradients held as they are."""

    def __init__(self, values: Tensor):
        self.values = values
        self.shape = tuple(values.shape)  # type: ignore[assignment]

    def dense(self, rows: slice) -> Tensor:
        return self.values[rows]


class Outer(Gradient):
    """Sums over positions of outer products, D_n = sum_t b_nt a_nt^T.

    ``inputs(rows)`` gives a [chunk, groups, positions, columns] (unfolded only when asked for),
    ``outputs`` is b [batch, groups, positions, rows].
    """

    factored = True

    def __init__(self, inputs: Callable[[slice], Tensor], outputs: Tensor, columns: int):
        self.inputs = inputs
        self.outputs = outputs
        batch, groups, self.positions, rows = outputs.shape
        self.shape = (batch, groups, rows, columns)

    @property
    def cost_per_example(self) -> int:
        _, groups, rows, columns = self.shape
        return groups * (rows * columns + self.positions * (rows + columns))

    def dense(self, rows: slice) -> Tensor:
        return self.outputs[rows].transpose(-1, -2) @ self.inputs(rows)

    def rotated(self, rows: slice, left: Tensor | None, right: Tensor | None) -> Tensor:
        # Each side before or after the sum over positions, whichever is cheaper.
        _, _, height, width = self.shape
        outputs, inputs = self.outputs[rows], self.inputs(rows)
        if self.positions < width:
            outputs, left = _turned(outputs, left), None
        if self.positions < height:
            inputs, right = _turned(inputs, right), None
        return matmul_sides(left, outputs.transpose(-1, -2) @ inputs, right)

    def in_basis(self, left: Tensor | None, right: Tensor | None) -> Outer:
        outputs = _turned(self.outputs, left)
        return Outer(lambda rows: _turned(self.inputs(rows), right), outputs, self.shape[3])

    @property
    def rotation_cost(self) -> int:
        _, groups, rows, columns = self.shape
        return groups * self.positions * (rows**2 + columns**2)

    def dot(self, queries: Tensor) -> Tensor:
        count, groups, height, width = queries.shape
        if self.positions > 1 or count >= width:
            return super().dot(queries)
        # q . (b a^T) = b . (q a): the products q a are smaller than the dense gradients.
        flat = queries.transpose(0, 1).flatten(1, 2).transpose(1, 2)
        parts = []
        for rows in self.chunks(count * groups * height):
            inputs = self.inputs(rows).squeeze(2).transpose(0, 1)
            outputs = self.outputs[rows].squeeze(2).transpose(0, 1)
            products = (inputs @ flat).unflatten(2, (count, height)) @ outputs.unsqueeze(3)
            parts.append(products.squeeze(3).sum(0).T)
        return torch.cat(parts, dim=1)

    def covariances(self, full: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
        left: Tensor | float = 0.0
        right: Tensor | float = 0.0
        for rows in self.chunks(self.shape[1] * self.positions * (self.shape[2] + self.shape[3])):
            left = left + second_moment(self.outputs[rows], full[0])
            right = right + second_moment(self.inputs(rows), full[1])
        assert isinstance(left, Tensor) and isinstance(right, Tensor)
        return left, right, left.new_full((self.shape[1],), self.batch * self.positions)

    def sum_of_squares(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        if self.positions > 1:
            return super().sum_of_squares(left, right)
        # One position: the squared outer product is the outer product of the squares.
        outputs, inputs = self._squared_factors(left, right)
        return torch.einsum("bgo,bgi->goi", outputs, inputs)

    def weighted_squares(
        self, left: Tensor | None, right: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        if self.positions > 1:
            if left is None and right is None and weight is None and self.gram_is_cheaper(self):
                return self._squared_norms()
            return super().weighted_squares(left, right, weight)
        outputs, inputs = self._squared_factors(left, right)
        if weight is None:
            return (outputs.sum(-1) * inputs.sum(-1)).sum(1)
        return torch.einsum("bgo,goi,bgi->b", outputs, weight, inputs)

    def _squared_norms(self) -> Tensor:
        """|D_n|^2 = sum_tu (b_t . b_u) (a_t . a_u), without forming D_n: [batch]."""
        parts = []
        for rows in self.chunks(self.shape[1] * self.positions**2 * 2):
            outputs, inputs = self.outputs[rows], self.inputs(rows)
            products = (outputs @ outputs.transpose(-1, -2)) * (inputs @ inputs.transpose(-1, -2))
            parts.append(products.flatten(1).sum(1))
        return torch.cat(parts)

    def _squared_factors(self, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
        turned = self.in_basis(left, right)
        return turned.outputs.squeeze(2) ** 2, turned.inputs(slice(None)).squeeze(2) ** 2

    def gram(self, queries: Outer) -> Tensor:
        """Inner products with factored queries through products of Gram matrices: [query, batch].

        <b a^T, b' a'^T> = (b . b') (a . a'), so no gradient is ever formed.
        """
        query_outputs, query_inputs = queries.outputs, queries.inputs(slice(None))
        per_example = query_outputs.shape[0] * queries.positions * self.positions * 2
        parts = []
        for rows in self.chunks(per_example):
            total: Tensor | float = 0.0
            for group in range(self.shape[1]):
                outputs, inputs = self.outputs[rows, group], self.inputs(rows)[:, group]
                products = (query_outputs[:, group].flatten(0, 1) @ outputs.flatten(0, 1).T) * (
                    query_inputs[:, group].flatten(0, 1) @ inputs.flatten(0, 1).T
                )
                shape = (-1, queries.positions, len(outputs), self.positions)
                total = total + products.reshape(shape).sum((1, 3))
            assert isinstance(total, Tensor)
            parts.append(total)
        return torch.cat(parts, dim=1)

    def gram_is_cheaper(self, queries: Outer) -> bool:
        """Whether :meth:`gram` takes fewer operations than a product with dense queries."""
        _, _, rows, columns = self.shape
        return queries.positions * self.positions * (rows + columns) < rows * columns
