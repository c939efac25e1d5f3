"""What all data modules share: sizes, seeds, loaders, and finding files."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tda_lightning.records.rendered import Rendered


class DataModule(LightningDataModule, ABC):
    """A training set and a set of queries, both with fixed indices.

    ``train_dataset`` and ``query_dataset`` are loaded on first use. Index n of the training set is
    column n of the scores, so reading an example draws nothing at random.

    Args:
        batch_size: examples in a training batch.
        seed: for the order of the training examples.
        num_workers: processes that load batches.
    """

    def __init__(self, batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._datasets: tuple[Dataset, Dataset] | None = None

    @abstractmethod
    def load(self) -> tuple[Dataset, Dataset]:
        """The training set and the queries."""

    @abstractmethod
    def render(self, split: str, index: int) -> Rendered:
        """Example ``index`` of ``split`` ("train" or "query") as a reader wants to see it."""

    def reordered(self, seed: int) -> DataModule:
        """The same data in the order that another seed draws; nothing is read again."""
        data = copy.copy(self)
        data.seed = seed
        return data

    def setup(self, stage: str | None = None) -> None:
        if self._datasets is None:
            self._datasets = self.load()

    def dataset(self, split: str) -> Dataset:
        """The data set of a split, "train" or "query"."""
        if split not in ("train", "query"):
            raise ValueError(f'split must be "train" or "query", got {split!r}.')
        self.setup()
        assert self._datasets is not None
        return self._datasets[0 if split == "train" else 1]

    @property
    def train_dataset(self) -> Dataset:
        """The training set."""
        return self.dataset("train")

    @property
    def query_dataset(self) -> Dataset:
        """The queries."""
        return self.dataset("query")

    def train_dataloader(self) -> DataLoader:
        # A generator of its own: the order does not depend on what else drew random numbers.
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self.train_dataset,
            batch_size=self.batch_size,
            shuffle=True,
            generator=order,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.query_dataset, batch_size=512, num_workers=self.num_workers)


def choose(population: int, size: int | None, seed: int, what: str) -> Tensor:
    """Sorted indices of a random subset, or of everything when ``size`` is None; int64 [size]."""
    if size is None:
        return torch.arange(population)
    if not 1 <= size <= population:
        raise ValueError(f"{what} must be between 1 and {population}, got {size}.")
    order = torch.randperm(population, generator=torch.Generator().manual_seed(seed))
    return order[:size].sort().values


def predicted_classes(outputs: Tensor, classes: Sequence[str]) -> list[str]:
    """The likeliest class and its probability for each row of logits [query, class].

    Example:
        >>> predicted_classes(torch.tensor([[0.0, 2.0]]), ["cat", "dog"])
        ['dog (88%)']
    """
    probabilities, predicted = outputs.float().softmax(dim=1).max(dim=1)
    return [
        f"{classes[label]} ({probability:.0%})"
        for probability, label in zip(probabilities.tolist(), predicted.tolist(), strict=True)
    ]


def find_files(root: str | Path, folder: str, names: Sequence[str], source: str) -> list[Path]:
    """Paths of ``names`` in ``root/folder``.

    Raises:
        FileNotFoundError: names the missing files and says where to get them.
    """
    paths = [Path(root) / folder / name for name in names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"Missing data files: {', '.join(missing)}. {source} Put them there, or say where they "
            "are with data.root=FOLDER (or the environment variable TDA_DATA_ROOT)."
        )
    return paths
