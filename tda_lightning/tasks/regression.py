"""Regression with the squared error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.tasks import batches
from tda_lightning.tasks.base import AttributionTask
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.gauss_newton import sampled_gauss_newton_loss
from tda_lightning.tasks.standard_losses import describe_numbers


@dataclass
class RegressionTask(AttributionTask):
    r"""Squared error as ``nn.MSELoss`` trains it: the mean over the k outputs of an example.

    .. math::
        l_n = \frac{s}{k} \sum_{i=1}^{k} (o_{ni} - y_{ni})^2

    Args:
        loss: only ``"mse"``.
        scale: the factor s, 0.5 for a training loss of half the squared error.
        target: key of the targets in dictionary batches.
        layers: names of modules (or prefixes) to restrict to.
    """

    loss: Literal["mse"] = "mse"
    scale: float = 1.0
    target: str | None = None
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.loss != "mse":
            raise ValueError(
                f"RegressionTask knows loss='mse', got {self.loss!r}. Use task=None or your own "
                "AttributionTask for other losses."
            )
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}.")

    def forward(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs and targets of one shape [batch, ...]."""
        inputs, target = batches.split_target(batch, self.target)
        return batches.call(module, inputs), target

    def train_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        outputs, target = self.forward(module, batch)
        if outputs.shape != target.shape:
            raise ValueError(
                f"Expected outputs and targets of one shape, got outputs {list(outputs.shape)} "
                f"and targets {list(target.shape)}: broadcasting would compare an example with "
                "the targets of others. Squeeze or unsqueeze one of them, in the data set, the "
                "model, or forward(module, batch) of the task."
            )
        losses = F.mse_loss(outputs, target.to(outputs.dtype), reduction="none")
        return self.scale * losses.reshape(len(losses), -1).mean(1)

    def sampled_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return sampled_gauss_newton_loss(self, module, batch)

    def prediction(self, module: nn.Module, batch: Batch) -> list[str] | None:
        outputs, _ = self.forward(module, batch)
        return describe_numbers(outputs.reshape(len(outputs), -1))
