"""A module in the manner of the template: network, optimizer and scheduler come as arguments."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn


def network(width: int) -> nn.Module:
    """Two inputs, two classes."""
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))


class PointsModule(LightningModule):
    """Classifies points."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., Any],
    ) -> None:
        super().__init__()
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        points, labels = batch
        return F.cross_entropy(self.net(points), labels)

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        points, labels = batch
        self.log("val/loss", F.cross_entropy(self.net(points), labels))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(params=self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer=optimizer)}
