"""Compressed gradients of all training examples, for questions that come later."""

from tda_lightning.index.approximate import ApproximateSearch
from tda_lightning.index.attribution_index import AttributionIndex
from tda_lightning.index.search import SearchResult

__all__ = ["ApproximateSearch", "AttributionIndex", "SearchResult"]
