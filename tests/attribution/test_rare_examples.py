"""An example that is made otherwise than all that attribution looks at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.estimators import Source, TracIn
from tda_lightning.tasks import AttributionTask
from tests.attributing import quiet, relative
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


class Trained(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tokens(AttributionTask):
    """The same by hand, where all training examples have as many tokens."""

    def train_loss(self, module: Any, batch: Any) -> Tensor:
        x, y, mask = batch
        losses = F.cross_entropy(module.net(x).movedim(-1, 1), y, reduction="none")
        return (losses * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize(
    "estimator", [TracIn(), Source(1, curvature="exact")], ids=["tracin", "source"]
)
def test_a_query_of_another_length_at_a_what_if_run(estimator: Any, tmp_path: Path) -> None:
    """What it shows of the loss is not forgotten when the attribution begins again."""
    short = torch.arange(3) < torch.full((12, 1), 2)
    data, module = TensorDataset(X[:12], Y[:12], short), Trained("mask")
    asked = TensorDataset(X[12:14], Y[12:14], torch.ones(2, 3, dtype=torch.bool))
    trainer = quiet(max_epochs=2, callbacks=[TrajectoryRecorder(str(tmp_path))])
    trainer.fit(module, DataLoader(data, batch_size=4))
    found, expected = (
        AttributionModule(module, str(tmp_path), estimator, task)
        .attribute(data, asked, keep=0.5, trainer=quiet())
        .values
        for task in (None, Tokens())
    )
    assert relative(found, expected.double()) < 1e-8
