"""Measurement gradients of the queries, factored where a layer's form allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tda_lightning.gradients import Gradient, Outer, Rows, scaled


class QueryGradients:
    """Gradients of some queries by block, in the batches that they came in."""

    def __init__(self, batches: Mapping[str, list[Gradient]]) -> None:
        self._batches = batches
        self._dense: dict[str, Tensor] = {}
        self._rows: dict[str, Rows | None] = {}

    @staticmethod
    def of(batches: Iterable[Mapping[str, Gradient]]) -> QueryGradients:
        """Of several batches of queries, each by block."""
        by_block: dict[str, list[Gradient]] = {}
        for gradients in batches:
            for name, gradient in gradients.items():
                by_block.setdefault(name, []).append(gradient)
        return QueryGradients(by_block)

    def scaled(self, weights: Mapping[str, Tensor]) -> QueryGradients:
        """Every entry times its weight, [groups, rows, columns] by block."""
        return QueryGradients(
            {
                name: [scaled(gradient, weights[name]) for gradient in gradients]
                for name, gradients in self._batches.items()
            }
        )

    def dot(self, gradients: Mapping[str, Gradient]) -> Tensor:
        """Inner products with training examples' gradients, summed over blocks: [query, batch]."""
        products = []
        for name, gradient in gradients.items():
            product = self._factored_dot(name, gradient)
            if product is None:
                product = gradient.dot(self._dense_of(name, gradient))
            products.append(product)
        return torch.stack(products).sum(0)

    def dense(self) -> dict[str, Tensor]:
        """By block, [query, groups, rows, columns]."""
        return {
            name: torch.cat([query.dense(slice(None)) for query in queries])
            for name, queries in self._batches.items()
        }

    def dot_and_squares(
        self, gradients: Mapping[str, Gradient], weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """:meth:`dot`, and the sum of each example's own squares times ``weights`` [groups, rows,
        columns] by block: [batch]."""
        products, squares = [], []
        for name, gradient in gradients.items():
            product = self._factored_dot(name, gradient)
            if product is None:
                queries = self._dense_of(name, gradient)
                product, own = gradient.dot_and_squares(queries, weights[name])
            else:
                own = gradient.weighted_squares(None, None, weights[name])
            products.append(product)
            squares.append(own)
        return torch.stack(products).sum(0), torch.stack(squares).sum(0)

    def _factored_dot(self, name: str, gradient: Gradient) -> Tensor | None:
        """Entry by entry where few rows are touched, or by Gram matrices of the factors where these
        are cheaper than dense queries; else None."""
        queries = self._batches[name]
        if rows := self._rows_of(name):
            return rows.met_by(gradient)
        if isinstance(gradient, Outer) and all(
            isinstance(query, Outer) and gradient.gram_is_cheaper(query) for query in queries
        ):
            return torch.cat([gradient.gram(query) for query in queries])  # type: ignore[arg-type]
        return None

    def _rows_of(self, name: str) -> Rows | None:
        """All queries of a block together, where they touch few of its rows."""
        if name not in self._rows:
            parts = [query for query in self._batches[name] if isinstance(query, Rows)]
            sparse = len(parts) == len(self._batches[name])
            self._rows[name] = Rows.stacked(parts) if sparse else None
        return self._rows[name]

    def _dense_of(self, name: str, gradient: Gradient) -> Tensor:
        if name not in self._dense:
            dense = torch.cat([query.dense(slice(None)) for query in self._batches[name]])
            self._dense[name] = gradient.arranged(dense)
        return self._dense[name]
