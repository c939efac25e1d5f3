"""What ``tda`` needs of a data module; ``tda_lightning.examples.data`` has some."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import DataLoader

from tda_lightning.records.rendered import Rendered


class AttributedData(Protocol):
    """A training set and queries, both with fixed indices: index n of the training set is column n
    of the scores."""

    @property
    def train_dataset(self) -> Any:
        """What the model was trained on."""

    @property
    def query_dataset(self) -> Any:
        """What the scores explain."""

    def setup(self, stage: str | None = None) -> None:
        """Load both, or fail if files are missing."""

    def train_dataloader(self) -> DataLoader[object]:
        """Training batches in the order that the seed draws."""

    def val_dataloader(self) -> DataLoader[object]:
        """Batches of the queries in order."""

    def render(self, split: str, index: int) -> Rendered:
        """Example ``index`` of ``split`` ("train" or "query") as a reader wants to see it."""


@runtime_checkable
class Describing(Protocol):
    """A data module that can put predictions in words."""

    def describe(self, outputs: Tensor) -> list[str]:
        """What the model predicts for each query, given its outputs [query, ...]."""


@runtime_checkable
class Reorderable(Protocol):
    """A data module whose seed decides nothing but the order of the training examples."""

    def reordered(self, seed: int) -> AttributedData:
        """The same data in the order that another seed draws."""
