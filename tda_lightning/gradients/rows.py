"""Per-example gradients that touch few rows of a weight (an embedding): one entry for each row
that an example looked up. Nothing here is as high as the weight but what is asked for so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tda_lightning.gradients import forms
from tda_lightning.gradients.basis import Basis, turned, turning_cost
from tda_lightning.gradients.forms import Dense, Gradient
from tda_lightning.gradients.moments import SideForm


class Rows(Gradient):
    """Row ``index[k]`` of the gradient of example ``example[k]`` is ``values[k]``; all others are
    zero. Entries are in the order of examples, then rows, each pair at most once."""

    factored = True

    def __init__(self, example: Tensor, index: Tensor, values: Tensor, batch: int, height: int):
        keys, inverse = torch.unique(example * height + index, return_inverse=True)
        merged = values.new_zeros(len(keys), values.shape[-1]).index_add_(0, inverse, values)
        self.example, self.index, self.values = keys // height, keys % height, merged
        self.shape = (batch, 1, height, values.shape[-1])

    def with_values(self, values: Tensor) -> Rows:
        """The same entries with other values [entry, columns]."""
        out = Rows.__new__(Rows)
        out.example, out.index, out.values, out.shape = self.example, self.index, values, self.shape
        return out

    @staticmethod
    def of(gradient: Gradient) -> Rows:
        """The rows of a gradient of another form that are not zero."""
        examples, indices, values = [], [], []
        for rows in gradient.chunks():
            dense = gradient.dense(rows)[:, 0]
            example, index = dense.any(-1).nonzero(as_tuple=True)
            examples.append(example + rows.start)
            indices.append(index)
            values.append(dense[example, index])
        batch, _, height, _ = gradient.shape
        return Rows(torch.cat(examples), torch.cat(indices), torch.cat(values), batch, height)

    @staticmethod
    def stacked(parts: Sequence[Rows]) -> Rows:
        """The examples of all parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        firsts = [sum(part.batch for part in parts[:number]) for number in range(len(parts))]
        out = Rows.__new__(Rows)
        out.example = torch.cat([p.example + first for p, first in zip(parts, firsts, strict=True)])
        out.index = torch.cat([part.index for part in parts])
        out.values = torch.cat([part.values for part in parts])
        out.shape = (firsts[-1] + parts[-1].batch, *parts[0].shape[1:])
        return out

    def dense(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.batch)
        inside = (self.example >= start) & (self.example < stop)
        out = self.values.new_zeros(stop - start, *self.shape[1:])
        out[self.example[inside] - start, 0, self.index[inside]] = self.values[inside]
        return out

    def in_basis(self, left: Basis, right: Basis) -> Gradient:
        if left is not None:
            return super().in_basis(left, right)
        return self.with_values(turned(self.values[None], right)[0])

    def rotation_cost(self, left: Basis, right: Basis) -> int:
        if left is not None:
            return super().rotation_cost(left, right)
        each = -(-len(self.index) // max(1, self.batch))
        return each * self.shape[3] * turning_cost(right, self.shape[3])

    def covariances(
        self, sides: tuple[SideForm, SideForm], weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = self.values
        own = values.new_ones(len(self.index)) if weights is None else weights[self.example]
        counts = values.new_zeros(self.shape[2]).index_add_(0, self.index, own)
        values = values if weights is None else values * own.sqrt()[:, None]
        return counts[None], sides[1].moment(values[:, None, None]), counts.sum()[None]

    def add_squares(self, total: Tensor, left: Basis, right: Basis) -> None:
        if left is not None:
            super().add_squares(total, left, right)
            return
        squares = turned(self.values[None], right)[0].square()
        total[0].index_add_(0, self.index, squares.to(total))

    def sum_of_squares(self, left: Basis, right: Basis) -> Tensor:
        if left is not None:
            return super().sum_of_squares(left, right)
        total = self.values.new_zeros(self.shape[1:])
        self.add_squares(total, left, right)
        return total

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
        for part in self._parts(len(queries) * self.shape[3]):
            products = torch.einsum(
                "qkd,kd->qk", queries[:, 0, self.index[part]], self.values[part]
            )
            out.index_add_(1, self.example[part], products)
        return out

    def pairs(self, queries: Rows) -> Tensor:
        """Inner products with queries that touch few rows: [query, batch].

        Every entry meets those of the queries in the same row and nothing else.
        """
        order = queries.index.argsort(stable=True)
        index, values = queries.index[order], queries.values[order]
        first = torch.searchsorted(index, self.index)
        met = torch.searchsorted(index, self.index, right=True) - first
        # Pair number p of all is entry ``own[p]`` here with entry ``theirs[p]`` of the queries.
        own = torch.repeat_interleave(met)
        theirs = torch.arange(len(own), device=own.device) - (met.cumsum(0) - met - first)[own]
        out = values.new_zeros(queries.batch * self.batch)
        place = queries.example[order][theirs] * self.batch + self.example[own]
        step = max(1, forms.CHUNK_SCALARS // self.shape[3])
        for start in range(0, len(own), step):
            part = slice(start, start + step)
            products = (values[theirs[part]] * self.values[own[part]]).sum(-1)
            out.index_add_(0, place[part], products)
        return out.view(queries.batch, self.batch)

    def met_by(self, gradient: Gradient) -> Tensor:
        """Inner products of these queries with the examples of ``gradient``, whatever its form:
        [query, batch]."""
        if isinstance(gradient, Rows):
            return gradient.pairs(self)
        out = []
        for rows in gradient.chunks(gradient.cost_per_example + self.values.numel()):
            there = gradient.dense(rows)[:, 0, self.index]
            products = torch.einsum("bkd,kd->kb", there, self.values)
            empty = products.new_zeros(self.batch, products.shape[1])
            out.append(empty.index_add_(0, self.example, products))
        return torch.cat(out, dim=1)

    def paired(self, other: Rows, right: Basis, weight: Tensor | None) -> Tensor:
        """sum_ij weight_ij (D_n right)_ij (E_n right)_ij with the gradients E of the same examples:
        [batch]."""
        height = self.shape[2]
        keys, others = (rows.example * height + rows.index for rows in (self, other))
        place = torch.searchsorted(others, keys).clamp(max=max(0, len(others) - 1))
        out = self.values.new_zeros(self.batch)
        if not len(others):
            return out
        same = (others[place] == keys).to(self.values)
        products = turned(self.values[None], right)[0] * turned(other.values[None], right)[0][place]
        products = products if weight is None else products * weight[0, self.index]
        return out.index_add_(0, self.example, products.sum(-1) * same)

    def weighted_sums(self, weights: Tensor) -> Tensor:
        total = weights.new_zeros(len(weights), *self.shape[1:])
        for part in self._parts(len(weights) * self.shape[3]):
            terms = weights[:, self.example[part], None] * self.values[part]
            total[:, 0].index_add_(1, self.index[part], terms)
        return total

    def mean(self) -> Tensor:
        return self.weighted_sums(self.values.new_ones(1, self.batch))[0] / self.batch

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        out = left.new_zeros(self.batch, left.shape[-1])
        for part in self._parts(2 * left.shape[-1]):
            products = (self.values[part] @ right[0]) * left[0, self.index[part]]
            out.index_add_(0, self.example[part], products)
        return out

    def _parts(self, scalars_per_entry: int) -> Iterator[slice]:
        """Slices of the entries that keep within ``CHUNK_SCALARS`` of working memory."""
        step = max(1, forms.CHUNK_SCALARS // max(1, scalars_per_entry))
        for start in range(0, len(self.index), step):
            yield slice(start, start + step)


def restricted(gradient: Gradient, rows: Tensor) -> Gradient:
    """The gradients in ``rows`` [count], ascending: [batch, groups, count, columns]."""
    if not isinstance(gradient, Rows):
        return Dense(torch.cat([gradient.dense(part)[:, :, rows] for part in gradient.chunks()]))
    place = torch.searchsorted(rows, gradient.index).clamp(max=len(rows) - 1)
    own = rows[place] == gradient.index
    out = Rows.__new__(Rows)
    out.example, out.index = gradient.example[own], place[own]
    out.values = gradient.values[own]
    out.shape = (gradient.batch, 1, len(rows), gradient.shape[3])
    return out


def touched_rows(batches: Iterable[Mapping[str, Gradient]]) -> dict[str, Tensor]:
    """Which rows some examples touch, ascending, of the blocks of which they touch few."""
    found: dict[str, Tensor] = {}
    for number, gradients in enumerate(batches):
        here = {n: g.index.unique() for n, g in gradients.items() if isinstance(g, Rows)}
        if number:
            here = {n: torch.cat([found[n], own]).unique() for n, own in here.items() if n in found}
        found = here
    return {name: rows for name, rows in found.items() if len(rows)}
