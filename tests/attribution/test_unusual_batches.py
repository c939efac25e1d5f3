"""Batches whose examples stand where one would not look first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from tests.standing import by_hand, standing_run, tracin

SIZE = 9
X = torch.randn(SIZE, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(SIZE) % 2
DATA = TensorDataset(X, Y)
COSTS = torch.tensor([1.0, 3.0], dtype=torch.float64)
Item = tuple[Tensor, Tensor]


class Net(LightningModule):
    def __init__(self, read: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(3, 2).double()
        self.bare = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + (x @ self.bare).tanh()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.read(batch)
        return F.cross_entropy(self(x), y)


def features(items: list[Item]) -> Tensor:
    return torch.stack([x for x, _ in items])


def labels(items: list[Item]) -> Tensor:
    return torch.stack([y for _, y in items])


def jagged(items: list[Item]) -> Any:
    x = torch.nested.as_nested_tensor([x[None] for x, _ in items], layout=torch.jagged)
    return x, labels(items)


FORMS: dict[str, tuple[Callable[[list[Item]], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "sparse": (
        lambda items: (features(items).to_sparse(), labels(items)),
        lambda batch: (batch[0].to_dense(), batch[1]),
    ),
    "nested": (
        lambda items: (torch.nested.as_nested_tensor([x for x, _ in items]), labels(items)),
        lambda batch: (torch.stack(batch[0].unbind()), batch[1]),
    ),
    "jagged": (jagged, lambda batch: (torch.cat(batch[0].unbind()), batch[1])),
    "columns": (
        lambda items: tuple(zip(*items, strict=True)),
        lambda batch: (torch.stack(batch[0]), torch.stack(batch[1])),
    ),
    "list of dictionaries": (
        lambda items: [{"x": x, "y": y} for x, y in items],
        lambda batch: tuple(torch.stack([one[key] for one in batch]) for key in "xy"),
    ),
    "by name": (
        lambda items: {f"{float(x[0]):.6f}": (x, y) for x, y in items},
        lambda batch: tuple(map(torch.stack, zip(*batch.values(), strict=True))),
    ),
    "examples last": (
        lambda items: (features(items).T, labels(items)),
        lambda batch: (batch[0].T, batch[1]),
    ),
    "number of examples": (
        lambda items: (features(items), labels(items), torch.tensor(len(items))),
        lambda batch: (batch[0][: int(batch[2])], batch[1]),
    ),
}


def expected(module: Net, chunk: int = 1) -> Tensor:
    rows = torch.arange(SIZE).split(chunk)
    losses = [F.cross_entropy(module(X[row]), Y[row]) for row in rows]
    return by_hand(module, losses, losses)


def run(module: Net, count: int = SIZE) -> Any:
    return standing_run(module, [[n] for n in range(count)])


@pytest.mark.filterwarnings("ignore:Per-example gradients of")
@pytest.mark.filterwarnings("ignore:In some batches the examples share")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("size", [2, 4])  # the first is as long as an example's dictionary
@pytest.mark.parametrize("name", FORMS)
def test_unusual_batches(name: str, size: int) -> None:
    collate, read = FORMS[name]
    module = Net(read)
    wanted = expected(module)
    loader = DataLoader(DATA, size, collate_fn=collate)
    scores = tracin(module, run(module), loader, loader)
    torch.testing.assert_close(scores.values, wanted)


class Costly(Net):
    """With a table of costs that is as long as a batch of two."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, costs = batch
        return (F.cross_entropy(self(x), y, reduction="none") * costs[y]).mean()


def test_a_table_as_long_as_a_batch() -> None:
    module = Costly(tuple)
    losses = [
        COSTS[Y[n]] * F.cross_entropy(module(X[n : n + 1]), Y[n : n + 1]) for n in range(SIZE)
    ]
    wanted = by_hand(module, losses, losses)
    loader = DataLoader(DATA, 2, collate_fn=lambda items: (*default_collate(items), COSTS))
    torch.testing.assert_close(tracin(module, run(module), loader, loader).values, wanted)


class Chunks(Dataset):
    """Batches made beforehand: each is one example of three rows."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Item:
        return X[3 * index : 3 * index + 3], Y[3 * index : 3 * index + 3]


def test_examples_that_nobody_joins() -> None:
    module = Net(tuple)
    wanted = expected(module), expected(module, 3)
    loader = DataLoader(DATA, batch_size=None)  # without a batch axis
    torch.testing.assert_close(tracin(module, run(module), loader, loader).values, wanted[0])
    loader = DataLoader(Chunks(), batch_size=None)
    torch.testing.assert_close(tracin(module, run(module, 3), loader, loader).values, wanted[1])
