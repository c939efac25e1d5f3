"""A data set is made into batches as the run's loader made them, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.store.fingerprints import collation
from tests.standing import by_hand, standing_run, tracin

pytestmark = pytest.mark.filterwarnings("ignore")

Item = tuple[Tensor, Tensor]
DRAW = torch.Generator().manual_seed(0)
ITEMS = [
    (torch.randn(1 + n % 3, 4, dtype=torch.float64, generator=DRAW), torch.tensor(n % 2))
    for n in range(6)
]
EVEN = [(x[:1].repeat(2, 1), y) for x, y in ITEMS]  # torch's own collate function takes them


def summed(items: list[Item]) -> list[Tensor]:
    return [torch.stack([2 * x.sum(0) for x, _ in items]), torch.stack([y for _, y in items])]


def noisy(items: list[Item]) -> list[Tensor]:
    x, y = summed(items)
    return [x + torch.randn_like(x), y]


def stacked(items: list[Item]) -> list[Tensor]:
    return [torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])]


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 2).double()

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x if x.dim() == 2 else x.sum(1)), y)


def run_by(module: nn.Module, loader: DataLoader[Any]) -> Any:
    return standing_run(module, [range(3), range(3, 6)], collation=collation(loader))


def loader_of(items: Any, collate: Any) -> DataLoader[Any]:
    return DataLoader(items, 3, collate_fn=collate)


def test_queries_are_made_into_batches_as_training_examples() -> None:
    module, train = Classifier(), loader_of(ITEMS, summed)
    run = run_by(module, train)
    losses = [module.training_step(summed([item]), 0) for item in ITEMS]
    want = by_hand(module, losses, losses[::-1])
    for query in (ITEMS[::-1], loader_of(ITEMS[::-1], summed)):
        got = tracin(module, run, train, query).values
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("collate", [summed, noisy])
def test_a_data_set_alone_is_refused_where_the_loader_made_other_batches(collate: Any) -> None:
    module, train = Classifier(), loader_of(EVEN, collate)
    run = run_by(module, train)
    with pytest.raises(TrajectoryMismatchError, match=rf"{collate.__name__}.*Pass the loader"):
        tracin(module, run, EVEN, EVEN)
    assert tracin(module, run, train, EVEN).values.shape == (6, 6)


def test_a_data_set_alone_will_do_where_it_makes_the_same_batches() -> None:
    module, train = Classifier(), loader_of(EVEN, stacked)
    run = run_by(module, train)
    losses = [module.training_step(stacked([item]), 0) for item in EVEN]
    got = tracin(module, run, EVEN, EVEN).values
    torch.testing.assert_close(got, by_hand(module, losses, losses), rtol=1e-10, atol=1e-14)
