"""Data sets whose items carry their indices through a ``DataLoader`` and its workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Keys: TypeAlias = Callable[[list[int]], object]


class Indexed(torch.utils.data.Dataset[tuple[int, object]]):
    """Items as (index, item)."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, object]:
        return index, self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, object]]:
        """Several at once: much faster for data sets that offer it (tables, subsets of them)."""
        return list(zip(indices, items_of(self.dataset, indices), strict=True))


class Collate:
    """Joins items of :class:`Indexed` into (batch, indices)."""

    def __init__(self, collate: Callable[[list[object]], object]):
        self.collate = collate

    def __call__(self, items: list[tuple[int, object]]) -> tuple[object, Tensor]:
        indices = torch.tensor([index for index, _ in items], dtype=torch.int64)
        return self.collate([item for _, item in items]), indices


class IndexedBatches(torch.utils.data.Dataset[tuple[list[int], object]]):
    """Batches as (indices, batch), where the data set makes them itself
    (``DataLoader(batch_size=None)``)."""

    def __init__(self, dataset: Any, keys: Keys):
        self.dataset, self.keys = dataset, keys

    def __getitem__(self, indices: Sequence[int]) -> tuple[list[int], object]:  # type: ignore[override]
        return list(indices), self.dataset[self.keys(list(indices))]


class Convert:
    """Makes (batch, indices) of what :class:`IndexedBatches` gives."""

    def __init__(self, convert: Callable[[Any], object]):
        self.convert = convert

    def __call__(self, read: tuple[list[int], object]) -> tuple[object, Tensor]:
        indices, batch = read
        return self.convert(batch), torch.tensor(indices, dtype=torch.int64)


def items_of(dataset: Any, indices: Sequence[int]) -> list[object]:
    """Items of a data set, all at once where it offers that."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(list(indices))  # type: ignore[no-any-return]
    return [dataset[index] for index in indices]


# What a data set without automatic batching is asked for. Functions of the module, so that
# workers that are started afresh find them.


def one_key(indices: list[int]) -> int:
    """The only index: the data set gives one thing for it, and nobody joins several."""
    (index,) = indices
    return index


def list_of_keys(indices: list[int]) -> list[int]:
    """The indices as a list."""
    return indices


def tuple_of_keys(indices: list[int]) -> tuple[int, ...]:
    """The indices as a tuple."""
    return tuple(indices)


def tensor_of_keys(indices: list[int]) -> Tensor:
    """The indices as a tensor."""
    return torch.tensor(indices, dtype=torch.int64)


def array_of_keys(indices: list[int]) -> np.ndarray:
    """The indices as an array."""
    return np.asarray(indices, dtype=np.int64)
