"""An example that is made otherwise than all that attribution looks at first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.standing import by_hand, standing_run, tracin

SIZE, RARE = 100, 44  # 32 spread over 100 leave it out
LENGTHS = torch.full((SIZE,), 2)
LENGTHS[RARE] = 3
MASK = torch.arange(3) < LENGTHS[:, None]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(SIZE, 3, 4, dtype=torch.float64, generator=GENERATOR)
Y = torch.randint(3, (SIZE, 3), generator=GENERATOR)


class Net(LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net, self.kind = nn.Linear(4, 3).double(), kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, mask = batch
        if self.kind == "real tokens":
            return F.cross_entropy(self.net(x[mask]), y[mask])
        losses = F.cross_entropy(self.net(x).movedim(-1, 1), y, reduction="none")
        if self.kind == "chosen":
            return losses[mask].mean()
        return (losses * mask).sum() / mask.sum()


@pytest.mark.filterwarnings("ignore:.*one example at a time")
@pytest.mark.filterwarnings("ignore:.*example by example")
@pytest.mark.parametrize("kind", ["mask", "chosen", "real tokens"])
def test_the_one_sentence_that_is_longer(kind: str) -> None:
    module, data = Net(kind), TensorDataset(X, Y, MASK)
    run = standing_run(module, [list(range(n, n + 10)) for n in range(0, SIZE, 10)])
    some = [0, RARE, 99]
    asked = torch.utils.data.Subset(data, some)
    scores = tracin(module, run, data, asked)
    own = [F.cross_entropy(module.net(X[n][MASK[n]]), Y[n][MASK[n]]) for n in range(SIZE)]
    average = float(LENGTHS.double().mean())
    train = [loss * (int(LENGTHS[n]) / average) for n, loss in enumerate(own)]
    expected = by_hand(module, train, [own[n] for n in some])
    torch.testing.assert_close(scores.values, expected)
