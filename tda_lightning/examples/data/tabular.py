"""Tables of numbers with a number to predict."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tda_lightning.examples.data.base import DataModule, choose, find_files
from tda_lightning.records.rendered import Rendered


class ConcreteData(DataModule):
    """UCI Concrete: compressive strength of 1030 concretes from their mix and age.

    Inputs and target are scaled to mean 0 and standard deviation 1 over the training set (a pool
    for a recorded run by the recorded one: :meth:`scaled_as`); the target has shape [batch, 1]. The
    data set is Yeh (1998), https://doi.org/10.24432/C5PK67.

    Args:
        root: folder that holds ``uci_concrete/concrete.csv``.
        batch_size: examples in a training batch.
        num_query: rows held out as queries.
        num_train: training rows to keep, drawn with ``split_seed``; None keeps all the others.
        split_seed: seed of both draws.
        seed: of the order in which training examples are drawn.
        num_workers: processes that load batches.
    """

    source = (
        "Get the data set from https://archive.ics.uci.edu/dataset/165 and save its rows as comma-"
        "separated values under a header line, the strength in the last column."
    )

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 32,
        num_query: int = 103,
        num_train: int | None = None,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.root = root
        self.num_query = num_query
        self.num_train = num_train
        self.split_seed = split_seed
        self.columns: list[str] = []
        self._rows: dict[str, Tensor] = {}
        self._moments: tuple[Tensor, Tensor] | None = None  # what rows are scaled by

    def scaled_as(self, recorded: ConcreteData) -> None:
        """Scale as ``recorded`` does, by the moments of its training set."""
        recorded.setup()
        self._moments = recorded._moments

    def load(self) -> tuple[Dataset, Dataset]:
        (path,) = find_files(self.root, "uci_concrete", ["concrete.csv"], self.source)
        self.columns, rows = read_csv(path)
        if not 1 <= self.num_query < len(rows):
            raise ValueError(
                f"num_query must be between 1 and {len(rows) - 1}, got {self.num_query}."
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.split_seed))
        query, train = rows[order[: self.num_query]], rows[order[self.num_query :]]
        train = train[choose(len(train), self.num_train, self.split_seed, "num_train")]
        self._rows = {"train": train, "query": query}

        if self._moments is None:
            self._moments = _moments(train)
        mean, std = self._moments
        scaled = [((part - mean) / std).float() for part in (train, query)]
        return (
            TensorDataset(scaled[0][:, :-1], scaled[0][:, -1:]),
            TensorDataset(scaled[1][:, :-1], scaled[1][:, -1:]),
        )

    def describe(self, outputs: Tensor) -> list[str]:
        """The predicted target of each query, in its own unit."""
        self.setup()
        assert self._moments is not None
        mean, std = (float(moment[-1]) for moment in self._moments)
        predicted = outputs[:, 0].double() * std + mean
        return [f"{self.columns[-1]} {value:.4g}" for value in predicted.tolist()]

    def group_columns(self, split: str) -> dict[str, list[float]]:
        """The numbers of the file by the names of their columns, in their own units."""
        self.setup()
        return dict(zip(self.columns, self._rows[split].T.tolist(), strict=True))

    def render(self, split: str, index: int) -> Rendered:
        self.setup()
        values = self._rows[split][index].tolist()
        # The target first: beside the score, where a reader compares them.
        row = dict(
            zip(self.columns[-1:] + self.columns[:-1], values[-1:] + values[:-1], strict=True)
        )
        return Rendered(row=row)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, float64 [column]."""
    # Through numpy, whose sums do not depend on the number of threads.
    mean = torch.from_numpy(rows.numpy().mean(axis=0))
    std = torch.from_numpy(rows.numpy().std(axis=0, ddof=1))
    # A column that never varies stays at 0 instead of becoming NaN.
    return mean, torch.where(std > 0, std, torch.ones_like(std))


def read_csv(path: Path) -> tuple[list[str], Tensor]:
    """The header and the numbers of a comma-separated file, float64 [row, column].

    Raises:
        ValueError: a row has another length than the header, or a field is no number; names it.
    """
    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = list(csv.reader(file))
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            rows.append([float(field) for field in line])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected numbers, {error}.") from None
        if len(line) != len(header):
            raise ValueError(
                f"{path}, line {number}: expected {len(header)} fields as in the header, "
                f"got {len(line)}."
            )
    return header, torch.tensor(rows, dtype=torch.float64)
