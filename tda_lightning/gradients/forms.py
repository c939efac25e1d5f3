"""Per-example gradients of one block, kept factored, and what is computed from them.

Every form offers the same few contractions; each does them the cheapest exact way its shape
allows, over chunks of examples that keep the working set small.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import reduce

import torch
from torch import Tensor

from tda_lightning.gradients.basis import Basis, matmul_sides, turned, turning_cost
from tda_lightning.gradients.moments import SideForm

# Working memory of one chunk of dense gradients, in scalars: large enough for efficient matrix
# products, small enough to stay out of the way of the model itself. Of glibc, blocks of more than
# 32 MiB come from the kernel anew each time, which writes zeros into them page by page.
CHUNK_SCALARS = 1 << 23
# A chunk that meets dense queries holds so many examples at least: each reads all queries.
_MET_TOGETHER = 16
_MET_SCALARS = 1 << 20  # of the products of examples with some queries: they stay in the cache


class Gradient(ABC):
    """Per-example gradients of one block: [batch, groups, rows, columns], not materialised."""

    shape: tuple[int, int, int, int]
    factored = False  # whether sides can be turned without forming the gradient

    @abstractmethod
    def dense(self, rows: slice) -> Tensor:
        """Gradients of the examples in ``rows``: [chunk, groups, rows, columns]."""

    @property
    def batch(self) -> int:
        """Number of examples."""
        return self.shape[0]

    @property
    def cost_per_example(self) -> int:
        """Scalars of working memory for one dense example."""
        return self.shape[1] * self.shape[2] * self.shape[3]

    def chunks(self, scalars_per_example: int | None = None, fewest: int = 1) -> Iterator[slice]:
        """Slices of the examples that keep within ``CHUNK_SCALARS`` of working memory, or hold
        ``fewest``."""
        per_example = max(1, scalars_per_example or self.cost_per_example)
        size = max(fewest, CHUNK_SCALARS // per_example)
        for start in range(0, self.batch, size):
            yield slice(start, min(start + size, self.batch))

    def rotated(self, rows: slice, left: Basis, right: Basis) -> Tensor:
        """left^T D_n right: coordinates in an eigenbasis, [chunk, groups, rows, columns]."""
        return matmul_sides(left, self.dense(rows), right)

    def in_basis(self, left: Basis, right: Basis) -> Gradient:
        """The gradients in the coordinates of an eigenbasis: left^T D_n right."""
        return Dense(torch.cat([self.rotated(rows, left, right) for rows in self.chunks()]))

    def rotation_cost(self, left: Basis, right: Basis) -> int:
        """Multiplications that :meth:`in_basis` takes for one example."""
        _, groups, rows, columns = self.shape
        cost = turning_cost(left, rows) + turning_cost(right, columns)
        return groups * rows * columns * cost

    def covariances(
        self, sides: tuple[SideForm, SideForm], weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments of the two sides, summed over examples: (rows, columns, count).

        Each in the form that ``sides`` asks for; that of a one-hot side is always its diagonal
        [groups, width]. For a factored gradient these are the sums over positions of
        b b^T and a a^T (K-FAC expand, Eschenhagen et al. 2023) and their number; for a dense one
        sum D D^T, sum D^T D and their trace. Either way rows x columns / count is the Kronecker
        approximation of the summed Fisher. ``weights`` [batch]: what each example counts by in
        the sums; None: 1.
        """
        parts = ((rows, self.dense(rows)) for rows in self.chunks())
        left, right = _totals(
            (sides[0].moment(dense.transpose(2, 3)), sides[1].moment(dense))
            for dense in (rooted(part, weights, rows) for rows, part in parts)
        )
        return left, right, sides[1].trace(right)

    def add_squares(self, total: Tensor, left: Basis, right: Basis) -> None:
        """Add :meth:`sum_of_squares` to ``total``, in its precision."""
        total += self.sum_of_squares(left, right)

    def sum_of_squares(self, left: Basis, right: Basis) -> Tensor:
        """Sum over examples of (left^T D_n right)^2: [groups, rows, columns]."""
        (total,) = _totals(
            (self.rotated(rows, left, right).square().sum(0),) for rows in self.chunks()
        )
        return total

    def weighted_squares(self, left: Basis, right: Basis, weight: Tensor | None) -> Tensor:
        """sum_ij weight_ij (left^T D_n right)_ij^2 of each example: [batch]."""
        parts = []
        for rows in self.chunks():
            squares = self.rotated(rows, left, right).square()
            squares = squares if weight is None else squares * weight
            parts.append(squares.flatten(1).sum(1))
        return torch.cat(parts)

    def dot(self, queries: Tensor) -> Tensor:
        """Inner products with dense queries [query, groups, rows, columns]: [query, batch]."""
        flat, chunks = queries.flatten(1), self.chunks(fewest=_MET_TOGETHER)
        return torch.cat([flat @ self.dense(rows).flatten(1).T for rows in chunks], dim=1)

    def dot_and_squares(self, queries: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`dot`, and :meth:`weighted_squares` on the parameters' own axes, from the same
        dense gradients where they are formed."""
        return self.dot(queries), self.weighted_squares(None, None, weight)

    def arranged(self, queries: Tensor) -> Tensor:
        """The same queries, in the order in memory that :meth:`dot` reads without a copy."""
        return queries.contiguous()

    def weighted_sums(self, weights: Tensor) -> Tensor:
        """sum_n weights_kn D_n for weights [count, batch]: [count, groups, rows, columns]."""
        total = weights.new_zeros(len(weights), math.prod(self.shape[1:]))
        for rows in self.chunks():
            # Under autocast a product made in here may come in half precision.
            total.addmm_(weights[:, rows], self.dense(rows).flatten(1).to(total))
        return total.unflatten(1, self.shape[1:])

    def add_weighted_sums(self, total: Tensor, weights: Tensor) -> None:
        """Add :meth:`weighted_sums` to ``total``, which may be part of a larger tensor."""
        total += self.weighted_sums(weights)

    def mean(self) -> Tensor:
        """Mean over the examples: [groups, rows, columns]."""
        total = torch.stack([self.dense(rows).sum(0) for rows in self.chunks()]).sum(0)
        return total / self.batch

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        """sum_g left_gk^T D_ng right_gk for every k: [batch, k].

        These are inner products with k gradients that are one outer product in each group, whose
        factors are ``left`` [groups, rows, k] and ``right`` [groups, columns, k].
        """
        _, groups, rows, columns = self.shape
        parts = []
        inner = groups * min(rows, columns) * left.shape[-1]
        for chunk in self.chunks(self.cost_per_example + inner):
            dense = self.dense(chunk)
            if rows <= columns:
                products = _turned(dense, right) * left
            else:
                products = _turned(dense.transpose(2, 3).contiguous(), left) * right
            parts.append(products.sum((1, 2)))
        return torch.cat(parts)


def _totals(terms: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """The sum of each entry over the terms."""
    return list(reduce(lambda sums, term: tuple(map(torch.add, sums, term)), terms))


def rooted(samples: Tensor, weights: Tensor | None, rows: slice) -> Tensor:
    """Samples [chunk, ...] of the examples in ``rows``, times the roots of their weights."""
    if weights is None:
        return samples
    return samples * weights[rows].sqrt().view(-1, *[1] * (samples.dim() - 1))


def _turned(samples: Tensor, basis: Basis) -> Tensor:
    """samples @ basis for samples [chunk, groups, positions, width]; None for the identity."""
    if basis is None:
        return samples
    if samples.stride(3) != 1:  # transposed patches: one product for each example, no copy
        return turned(samples, basis)
    # One product for each group: many thin ones would read the basis again for every example.
    flat = turned(samples.transpose(0, 1).flatten(1, 2), basis)
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
    ``outputs`` is b [batch, groups, positions, rows]. ``filled`` [batch, groups] says how many of
    an example's positions are there at all; None: every one.
    """

    factored = True

    def __init__(
        self,
        inputs: Callable[[slice], Tensor],
        outputs: Tensor,
        columns: int,
        filled: Tensor | None = None,
    ):
        self.inputs = inputs
        self.filled = filled
        self.outputs = outputs
        batch, groups, self.positions, rows = outputs.shape
        self.shape = (batch, groups, rows, columns)

    @property
    def cost_per_example(self) -> int:
        _, groups, rows, columns = self.shape
        return groups * (rows * columns + self.positions * (rows + columns))

    def dense(self, rows: slice) -> Tensor:
        return self.outputs[rows].transpose(-1, -2) @ self.inputs(rows)

    def rotated(self, rows: slice, left: Basis, right: Basis) -> Tensor:
        # Each side before or after the sum over positions, whichever is cheaper.
        _, _, height, width = self.shape
        outputs, inputs = self.outputs[rows], self.inputs(rows)
        if self.positions < width:
            outputs, left = _turned(outputs, left), None
        if self.positions < height:
            inputs, right = _turned(inputs, right), None
        return matmul_sides(left, outputs.transpose(-1, -2) @ inputs, right)

    def in_basis(self, left: Basis, right: Basis) -> Outer:
        outputs = _turned(self.outputs, left)
        inputs = self.inputs
        return Outer(lambda rows: _turned(inputs(rows), right), outputs, self.shape[3], self.filled)

    def rotation_cost(self, left: Basis, right: Basis) -> int:
        _, groups, rows, columns = self.shape
        cost = rows * turning_cost(left, rows) + columns * turning_cost(right, columns)
        return groups * self.positions * cost

    def dot(self, queries: Tensor) -> Tensor:
        count, groups, height, _ = queries.shape
        if not self._meets_factors(count):
            flat = queries.mT.flatten(1)
            return torch.cat([flat @ dense.T for dense in self.columns_first()], dim=1)
        # q . (b a^T) = b . (q a): the products q a are smaller than the dense gradients. Many
        # examples meet few queries at a time: a matrix product first copies what it reads.
        parts = []
        for rows in self.chunks(groups * height):
            inputs = self.inputs(rows).squeeze(2).transpose(0, 1)
            outputs = self.outputs[rows].squeeze(2).transpose(0, 1).unsqueeze(3)
            together = max(1, _MET_SCALARS // (inputs.shape[1] * groups * height))
            met = []
            for own in queries.split(together):
                flat = own.transpose(0, 1).flatten(1, 2).mT
                products = (inputs @ flat).unflatten(2, (len(own), height)) @ outputs
                met.append(products.squeeze(3).sum(0).T)
            parts.append(torch.cat(met))
        return torch.cat(parts, dim=1)

    def dot_and_squares(self, queries: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.positions == 1:
            return super().dot_and_squares(queries, weight)
        flat, weights = queries.mT.flatten(1), weight.mT.flatten()
        products, squares = [], []
        for dense in self.columns_first():
            products.append(flat @ dense.T)
            squares.append(dense.square_() @ weights)
        return torch.cat(products, dim=1), torch.cat(squares)

    def columns_first(self) -> Iterator[Tensor]:
        """Chunks of dense gradients, transposed and flat, that are met by queries: patches have
        their positions innermost, and of two such factors the product is twice as fast with the
        wider one in front."""
        for rows in self.chunks(fewest=_MET_TOGETHER):
            yield (self.inputs(rows).mT @ self.outputs[rows]).flatten(1)

    def arranged(self, queries: Tensor) -> Tensor:
        if self._meets_factors(len(queries)):
            return queries.contiguous()
        return queries.mT.contiguous().mT

    def weighted_sums(self, weights: Tensor) -> Tensor:
        count = len(weights)
        if not self._meets_factors(count):
            return super().weighted_sums(weights)
        total = weights.new_zeros(count, *self.shape[1:])
        self.add_weighted_sums(total, weights)
        return total

    def add_weighted_sums(self, total: Tensor, weights: Tensor) -> None:
        count, (_, groups, height, width) = len(weights), self.shape
        if not self._meets_factors(count):
            super().add_weighted_sums(total, weights)
            return
        # Products of w b with a for each sum: no gradient is formed.
        for rows in self.chunks(count * height + width):
            outputs, inputs = self.outputs[rows].squeeze(2), self.inputs(rows).squeeze(2)
            for group in range(groups):
                weighted = weights[:, None, rows] * outputs[:, group].T
                total[:, group].baddbmm_(weighted, inputs[:, group].expand(count, -1, -1))

    def _meets_factors(self, count: int) -> bool:
        """Whether so many dense tensors are better met by one factor after the other."""
        return self.positions == 1 and count < self.shape[3]

    def covariances(
        self, sides: tuple[SideForm, SideForm], weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, groups, height, width = self.shape
        left, right = _totals(
            (
                sides[0].moment(rooted(self.outputs[rows], weights, rows)),
                sides[1].moment(rooted(self.inputs(rows), weights, rows)),
            )
            for rows in self.chunks(groups * self.positions * (height + width))
        )
        return left, right, self.samples(weights).to(left)

    def samples(self, weights: Tensor | None = None) -> Tensor:
        """Positions of all examples, each times its example's weight [batch]: [groups]."""
        if self.filled is not None:
            filled = self.filled if weights is None else self.filled * weights[:, None]
            return filled.sum(0)
        examples = self.batch if weights is None else float(weights.sum())
        return self.outputs.new_full((self.shape[1],), self.positions * examples)

    def sum_of_squares(self, left: Basis, right: Basis) -> Tensor:
        if self.positions > 1:
            return super().sum_of_squares(left, right)
        # One position: the squared outer product is the outer product of the squares.
        outputs, inputs = self._squared_factors(left, right)
        return torch.einsum("bgo,bgi->goi", outputs, inputs)

    def weighted_squares(self, left: Basis, right: Basis, weight: Tensor | None) -> Tensor:
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

    def _squared_factors(self, left: Basis, right: Basis) -> tuple[Tensor, Tensor]:
        turned = self.in_basis(left, right)
        return turned.outputs.squeeze(2) ** 2, turned.inputs(slice(None)).squeeze(2) ** 2

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        _, groups, rows, columns = self.shape
        if self.positions > 1 and self.positions * (rows + columns) > rows * columns:
            return super().bilinear(left, right)  # the sum over positions first
        # left . b a^T right = (left . b) (a . right): no gradient is formed.
        parts = []
        for chunk in self.chunks(2 * groups * self.positions * left.shape[-1]):
            products = _turned(self.outputs[chunk], left) * _turned(self.inputs(chunk), right)
            parts.append(products.sum((1, 2)))
        return torch.cat(parts)

    def gram(self, queries: Outer) -> Tensor:
        """Inner products with factored queries through products of Gram matrices: [query, batch].

        <b a^T, b' a'^T> = (b . b') (a . a'), so no gradient is ever formed.
        """
        query_outputs, query_inputs = queries.outputs, queries.inputs(slice(None))
        per_example = query_outputs.shape[0] * queries.positions * self.positions * 2
        parts = []
        for rows in self.chunks(per_example):
            outputs, inputs = self.outputs[rows], self.inputs(rows)
            total = queries.outputs.new_zeros(len(query_outputs), len(outputs))
            for group in range(self.shape[1]):
                products = (
                    query_outputs[:, group].flatten(0, 1) @ outputs[:, group].flatten(0, 1).T
                ) * (query_inputs[:, group].flatten(0, 1) @ inputs[:, group].flatten(0, 1).T)
                shape = (-1, queries.positions, len(outputs), self.positions)
                total += products.reshape(shape).sum((1, 3))
            parts.append(total)
        return torch.cat(parts, dim=1)

    def gram_is_cheaper(self, queries: Outer) -> bool:
        """Whether :meth:`gram` takes fewer operations than a product with dense queries."""
        _, _, rows, columns = self.shape
        return queries.positions * self.positions * (rows + columns) < rows * columns
