"""Loaders keep their way of making batches; what cannot be followed is refused."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from tda_lightning.runtime.loading import ExampleSource
from tests.standing import by_hand, standing_run, tracin

SIZE = 9
X = torch.randn(SIZE, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(SIZE) % 2
BATCHES = [[0, 5, 2, 7], [1, 3, 4], [6, 8]]


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(3, 2).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def tenfold(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return 10 * torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])


class Table(Dataset):
    """Takes an index or several at once, as they come; without ``__getitems__``."""

    def __init__(self, kind: type = object) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        assert isinstance(index, self.kind)
        index = torch.as_tensor(index)
        return X[index], Y[index]


class Drawing:
    """A sampler of batches in a form of its own."""

    def __init__(self, form: Any) -> None:
        self.form = form

    def __iter__(self) -> Iterator[Any]:
        return iter([self.form(batch) for batch in BATCHES])

    def __len__(self) -> int:
        return len(BATCHES)


def times_ten(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return 10 * batch[0], batch[1]


def unbatched(item: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return 10 * item[0][None], item[1][None]


DATA = TensorDataset(X, Y)
TENFOLD = {
    "collate_fn": lambda: DataLoader(DATA, 4, collate_fn=tenfold),
    "a list of batches": lambda: DataLoader(DATA, batch_sampler=BATCHES, collate_fn=tenfold),
    "BatchSampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, True), collate_fn=tenfold
    ),
    "lists": lambda: DataLoader(
        Table(list), batch_size=None, sampler=Drawing(list), collate_fn=times_ten
    ),
    "tuples": lambda: DataLoader(
        Table(tuple), batch_size=None, sampler=Drawing(tuple), collate_fn=times_ten
    ),
    "tensors": lambda: DataLoader(
        Table(Tensor), batch_size=None, sampler=Drawing(torch.tensor), collate_fn=times_ten
    ),
    "sampler of batches": lambda: DataLoader(
        Table(),
        batch_size=None,
        sampler=BatchSampler(SequentialSampler(range(SIZE)), 4, False),
        collate_fn=times_ten,
    ),
    "one by one": lambda: DataLoader(Table(int), batch_size=None, collate_fn=unbatched),
    "ConcatDataset": lambda: DataLoader(
        ConcatDataset([Subset(DATA, range(4)), Subset(DATA, range(4, 9))]), 4, collate_fn=tenfold
    ),
}


@pytest.mark.parametrize("name", TENFOLD)
def test_a_loaders_way_of_making_batches_is_kept(name: str) -> None:
    module, loader = Net(), TENFOLD[name]()
    state = torch.get_rng_state()
    scores = tracin(module, standing_run(module, BATCHES), loader, loader)
    assert torch.equal(torch.get_rng_state(), state)
    losses = [F.cross_entropy(module.net(10 * x[None]), y[None]) for x, y in zip(X, Y, strict=True)]
    torch.testing.assert_close(scores.values, by_hand(module, losses, losses))
    assert scores.provenance["notes"] == []


def mark(worker: int) -> None:
    os.environ["TDA_TEST_FACTOR"] = "10"


class Marked(Dataset):
    """Multiplies by what the worker was told when it started."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return float(os.environ.get("TDA_TEST_FACTOR", "1")) * X[index], Y[index]


def test_workers_start_as_the_loader_starts_them() -> None:
    fork = multiprocessing.get_context("fork")
    loader = DataLoader(
        Marked(),
        3,
        num_workers=1,
        worker_init_fn=mark,
        multiprocessing_context=fork,
        prefetch_factor=3,
        timeout=60,
    )
    source = ExampleSource.of(loader, 1, "training")
    own = source.indexed(source.batches())
    assert own.multiprocessing_context is fork and (own.prefetch_factor, own.timeout) == (3, 60)
    for (x, _), indices in own:
        torch.testing.assert_close(x, 10 * X[indices])


class Harmless(DataLoader):
    def __iter__(self) -> Any:
        yield from super().__iter__()


class Doubling(DataLoader):
    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield 2 * x, y


class Restless(DataLoader):
    """Goes on where it was (as loaders that keep their workers between epochs do)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.going = super().__iter__()

    def __iter__(self) -> Any:
        yield next(self.going)


class Pages(DataLoader):
    """Another class that makes its batches by a collate function of its own."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(data, 4, collate_fn=tenfold)


def test_a_subclass_is_followed_or_refused() -> None:
    assert ExampleSource.of(Pages(DATA), 1, "training").collate is tenfold
    assert len(ExampleSource.of(Harmless(DATA, 4), 1, "training")) == SIZE
    for loader in (Doubling(DATA, 4), Restless(DATA, 4)):
        with pytest.raises(TypeError, match="hands out other batches .* plain DataLoader"):
            ExampleSource.of(loader, 1, "training")


@pytest.mark.parametrize(
    "several",
    [
        lambda loader: [loader],
        lambda loader: (loader, loader),
        lambda loader: {"a": loader, "b": loader},
        lambda loader: CombinedLoader({"a": loader, "b": loader}, "min_size"),
        lambda loader: CombinedLoader([loader], "sequential"),
    ],
)
def test_several_loaders_are_refused(several: Any) -> None:
    with pytest.raises(TypeError, match="of loaders, expected one"):
        ExampleSource.of(several(DataLoader(DATA, 4)), 1, "training")


def test_keys_that_are_no_indices_are_refused() -> None:
    loader = DataLoader(Table(), batch_size=None, sampler=[slice(0, 4), slice(4, 9)])
    with pytest.raises(TypeError, match="asks for slice: expected an index or a list"):
        ExampleSource.of(loader, 1, "training")
