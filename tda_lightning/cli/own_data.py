"""One's own ``LightningDataModule`` as the commands see it: a training set and queries."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch.utils.data import Subset

from tda_lightning.records.data_module import AttributedData
from tda_lightning.records.rendered import Rendered
from tda_lightning.runtime.loading import ExampleSource, is_data_module

_LOADERS = {"val": "val_dataloader", "test": "test_dataloader", "predict": "predict_dataloader"}
_STAGES = {"val": "fit", "test": "test", "predict": "predict"}


class OwnData:
    """A plain data module with what the commands ask for besides.

    Attributes:
        own: the data module.

    Args:
        own: it.
        queries: which of its sets is explained: ``val``, ``test`` or ``predict``.
        num_query: only the first so many; None: all.

    Raises:
        ValueError: an unknown set.
    """

    def __init__(self, own: Any, queries: str = "val", num_query: int | None = None) -> None:
        if queries not in _LOADERS:
            raise ValueError(f"data.queries must be one of {', '.join(_LOADERS)}, got {queries!r}.")
        self.own, self.queries, self.num_query = own, queries, num_query
        self._stages: set[str] = set()

    def setup(self, stage: str | None = None) -> None:
        """Set the data module up for training and for the queries, once."""
        for wanted in ("fit", _STAGES[self.queries]):
            if wanted not in self._stages:
                if not self._stages:
                    self.own.prepare_data()
                self.own.setup(wanted)
                self._stages.add(wanted)

    def train_dataloader(self) -> Any:
        """The data module's own."""
        self.setup()
        return self.own.train_dataloader()

    def val_dataloader(self) -> Any:
        """The loader of the queries.

        Raises:
            ValueError: the data module has none, or several.
        """
        self.setup()
        name = _LOADERS[self.queries]
        loader = getattr(self.own, name)()
        several = list(loader) if isinstance(loader, list | tuple) else [loader]
        if len(several) != 1 or several[0] is None:
            raise ValueError(
                f"Queries are the examples of {type(self.own).__name__}.{name}(), expected one "
                f"loader, got {len(several) if several[0] is not None else 'none'}. Choose another "
                f"set with +data.queries=SET, one of {', '.join(_LOADERS)}."
            )
        return several[0]

    @cached_property
    def train_dataset(self) -> Any:
        """What the training loader reads."""
        return ExampleSource.of(self.train_dataloader(), 1, "training").dataset

    @cached_property
    def query_dataset(self) -> Any:
        """What the loader of the queries reads, or its first ``num_query`` examples."""
        dataset = ExampleSource.of(self.val_dataloader(), 1, "query").dataset
        if self.num_query is None or self.num_query >= len(dataset):
            return dataset
        return Subset(dataset, range(self.num_query))

    def render(self, split: str, index: int) -> Rendered:
        """By the data module's ``render`` if it has one, else as its type suggests."""
        if callable(getattr(self.own, "render", None)):
            shown: Rendered = self.own.render(split, index)
            return shown
        return self._renderer(split, index)

    @cached_property
    def _renderer(self) -> Any:
        from tda_lightning.report import DatasetRenderer

        return DatasetRenderer(self.train_dataset, self.query_dataset)


def as_attributed(data: Any, queries: str = "val", num_query: int | None = None) -> AttributedData:
    """A data module that has all the commands ask for, as it is; a plain one with it added.

    Raises:
        TypeError: it is no data module.
    """
    if all(hasattr(type(data), name) for name in ("train_dataset", "query_dataset", "render")):
        attributed: AttributedData = data
        return attributed
    if not is_data_module(data):
        raise TypeError(
            f"data must be a LightningDataModule, got {type(data).__module__}."
            f"{type(data).__qualname__}."
        )
    return OwnData(data, queries, num_query)
