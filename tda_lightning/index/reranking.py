"""Exact scores of the best examples that an index found."""

from __future__ import annotations

from typing import Any

import torch

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.edits import Removal
from tda_lightning.index.search import SearchResult
from tda_lightning.runtime.loading import ExampleSource


def reranked(
    attribution: AttributionModule,
    source: ExampleSource,
    queries: object,
    found: SearchResult,
    k: int,
    count: int,
    measurement: Any,
) -> SearchResult:
    """The best ``k`` of ``found`` by their exact scores.

    Only gradients of what was found for any query are computed. Values of appended examples, which
    the training set does not hold, stay those of the index.
    """
    sides = torch.cat([found.indices, found.opponents], dim=1)
    values = torch.cat([found.values, found.opponent_values], dim=1)
    fetched = sides[sides < len(source)].unique()
    if len(fetched):
        values = _exact(attribution, source, queries, sides, values, fetched, measurement)
    width = found.indices.shape[1]
    helping = _best(sides[:, :width], values[:, :width], k, descending=True)
    hurting = _best(sides[:, width:], values[:, width:], k, descending=False)
    return SearchResult(*helping, *hurting, count, found.num_examples)


def _exact(
    attribution: AttributionModule,
    source: ExampleSource,
    queries: object,
    sides: torch.Tensor,
    values: torch.Tensor,
    fetched: torch.Tensor,
    measurement: Any,
) -> torch.Tensor:
    """The values of these examples, [query, any], those of ``fetched`` ones computed anew."""
    scores = attribution.attribute(
        source,
        queries,
        batch_size=source.batch_size,
        self_influence=False,
        edits=[Removal(index) for index in fetched.tolist()],
        measurement=measurement,
    )
    place = torch.searchsorted(fetched, sides).clamp(max=len(fetched) - 1)
    return torch.where(sides < len(source), scores.values.to(values).gather(1, place), values)


def _best(
    indices: torch.Tensor, values: torch.Tensor, k: int, descending: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    order = indices.argsort(dim=1, stable=True)
    indices, values = indices.gather(1, order), values.gather(1, order)
    order = values.argsort(dim=1, descending=descending, stable=True)[:, :k]
    return indices.gather(1, order), values.gather(1, order)
