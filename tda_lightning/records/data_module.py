"""What ``tda`` needs of a data module, ``tda_lightning.examples.data`` has some; and whether a
recorded run needs its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import DataLoader

from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.records.rendered import Rendered
from tda_lightning.records.trajectory import Facts
from tda_lightning.runtime.loading import ExampleSource


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
class Grouped(Protocol):
    """A data module that says by what its examples can be grouped."""

    def group_columns(self, split: str) -> Mapping[str, Sequence[object]]:
        """One value for each example of ``split`` ("train" or "query"), by the name of the column;
        "class" or "label" is what the model should predict."""


@runtime_checkable
class Textual(Protocol):
    """A data module whose examples are texts."""

    def documents(self, split: str) -> Sequence[Sequence[Hashable]]:
        """The words or token numbers of each example of ``split`` ("train" or "query"), without
        padding."""


@runtime_checkable
class Reorderable(Protocol):
    """A data module whose seed decides nothing but the order of the training examples."""

    def reordered(self, seed: int) -> AttributedData:
        """The same data in the order that another seed draws."""


@runtime_checkable
class Scaled(Protocol):
    """A data module that scales its examples by what its training set is like."""

    def scaled_as(self, recorded: Any) -> None:
        """Scale all examples as ``recorded``, a data module of the same class, scales its own: a
        model trained on that one takes no other units."""


def require_data_module(facts: Facts, source: ExampleSource) -> None:
    """Refuse to read a run's batches without the hooks that they went through.

    Raises:
        TrajectoryMismatchError: the run's data module changed batches in its transfer hooks, and no
            data module was passed.
    """
    hooks = facts.settings.get("transfer_hooks") or {}
    overridden = hooks.get("data_module") or []
    if overridden and source.data_module is None:
        raise TrajectoryMismatchError(
            f"The run's batches went through {' and '.join(overridden)} of its data module, "
            f"{facts.settings.get('data_module')}, and a data set alone does not have them. Pass "
            "the data module: attribute(train=datamodule, query=...), and to functions of "
            "tda_lightning.evaluation in the place of the data set."
        )
