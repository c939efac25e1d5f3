"""Data sets read with their indices: column n of the scores is index n, whatever the order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate


class _Indexed(torch.utils.data.Dataset[tuple[int, object]]):
    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, object]:
        return index, self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, object]]:
        """Several at once: much faster for data sets that offer it (tables, subsets of them)."""
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(list(indices))
        else:
            items = [self.dataset[index] for index in indices]
        return list(zip(indices, items, strict=True))


class _Collate:
    def __init__(self, collate: Callable[[list[object]], object]):
        self.collate = collate

    def __call__(self, items: list[tuple[int, object]]) -> tuple[object, Tensor]:
        indices = torch.tensor([index for index, _ in items], dtype=torch.int64)
        return self.collate([item for _, item in items]), indices


@dataclass(frozen=True)
class ExampleSource:
    """A map-style data set and how its examples become batches."""

    dataset: Any
    batch_size: int
    collate: Callable[[list[object]], object] = default_collate
    num_workers: int = 0
    pin_memory: bool = False

    @classmethod
    def of(cls, data: object, batch_size: int, what: str) -> ExampleSource:
        """From a data set, or from a loader whose collate function and batch size are kept.

        Raises:
            ValueError: the data set is empty.
            TypeError: it cannot be read by index.
        """
        if isinstance(data, DataLoader):
            source = cls(
                data.dataset,
                data.batch_size or batch_size,
                data.collate_fn if data.batch_size is not None else default_collate,
                data.num_workers,
                data.pin_memory,
            )
        else:
            source = cls(data, batch_size)
        dataset = source.dataset
        readable = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not readable or isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{what} must be a map-style Dataset or a DataLoader over one, got "
                f"{type(dataset).__name__}: scores belong to example indices."
            )
        if len(dataset) == 0:
            raise ValueError(f"The {what} set is empty: there is nothing to attribute.")
        if source.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        return source

    def __len__(self) -> int:
        return len(self.dataset)

    def loader(self, batches: Sequence[Sequence[int]]) -> DataLoader[tuple[int, object]]:
        """The given batches of indices, each as (batch, indices)."""
        return DataLoader(
            _Indexed(self.dataset),
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=_Collate(self.collate),
            num_workers=self.num_workers if len(batches) > 1 else 0,
            pin_memory=self.pin_memory,
            # Its own: reading draws nothing from the generators of the user's program.
            generator=torch.Generator(),
        )

    def batches(
        self, start: int = 0, stop: int | None = None, size: int | None = None
    ) -> list[range]:
        """Consecutive batches of the examples from ``start`` to ``stop``."""
        end, size = len(self) if stop is None else stop, size or self.batch_size
        return [range(first, min(first + size, end)) for first in range(start, end, size)]


def place(batch: Any, module: nn.Module) -> Any:
    """The batch on the module's device, by the module's own transfer hooks where it has them."""
    device = next(module.parameters()).device
    hooks: Any = module
    if hasattr(module, "on_after_batch_transfer"):  # a LightningModule
        batch = hooks.on_before_batch_transfer(batch, 0)
        batch = hooks.transfer_batch_to_device(batch, device, 0)
        return hooks.on_after_batch_transfer(batch, 0)
    move = lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf  # noqa: E731
    return pytree.tree_map(move, batch)


def fetch(source: ExampleSource, examples: Tensor) -> object:
    """The batch of these examples, read as a ``DataLoader`` reads it."""
    if type(source.dataset) is TensorDataset and source.collate is default_collate:
        return list(source.dataset[examples])  # the same batch, without a call for each example
    indices = examples.tolist()
    if hasattr(source.dataset, "__getitems__"):
        return source.collate(source.dataset.__getitems__(indices))
    return source.collate([source.dataset[index] for index in indices])
