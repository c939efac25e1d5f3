"""What curvature statistics gathered in training say of losses that are no standard ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning.recording import TrajectoryRecorder
from tests.runs import trainer


class Stepped(LightningModule):
    def __init__(self, loss: Callable[[LightningModule, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = nn.Linear(4, 3), loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def focal(m: Any, x: Tensor, y: Tensor) -> Tensor:
    own = F.cross_entropy(m.net(x), y, reduction="none")
    return ((1 - torch.exp(-own)) ** 2 * own).mean()


def confident(m: Any, x: Tensor, y: Tensor) -> Tensor:
    outputs = m.net(x)
    return (outputs[:, 0].sigmoid() * F.cross_entropy(outputs, y, reduction="none")).mean()


def another(m: Any, x: Tensor, y: Tensor) -> Tensor:
    outputs = m.net(x)
    return F.cross_entropy(outputs, y) + outputs.abs().mean()


def plain(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return 0.3 * F.cross_entropy(m.net(x), y) + F.mse_loss(m.net(x)[:, 0], x[:, 0])


def recorded(loss: Any, path: Path) -> list[str]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 4), torch.randint(3, (12,)))
    recorder = TrajectoryRecorder(path, num_checkpoints=1, curvature="online", curvature_every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(recorder, max_epochs=1).fit(Stepped(loss), DataLoader(data, 4))
    return [str(w.message) for w in caught if "curvature='online'" in str(w.message)]


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (focal, "weights of standard losses depend on the model|is no standard loss"),
        (confident, "weights of standard losses depend on the model"),
        (another, "is no standard loss"),
    ],
)
def test_other_losses_are_warned_of_once(loss: Any, reason: str, tmp_path: Path) -> None:
    (message,) = recorded(loss, tmp_path / "run")
    assert any(part in message for part in reason.split("|"))
    assert "fisher='empirical'" in message


def test_standard_losses_are_not(tmp_path: Path) -> None:
    assert recorded(plain, tmp_path / "run") == []
