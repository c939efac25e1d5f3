"""Many retrainings at once: models stacked along a leading axis, run by ``torch.func.vmap``.

The optimizers step element by element, so torch.optim itself moves the stacked parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tda_lightning.tasks import AttributionTask, example_noise, silenced

if TYPE_CHECKING:
    from tda_lightning.evaluation.retraining import Replay, State


class _Losses(nn.Module):
    """A module whose forward is the losses, so that ``functional_call`` can swap parameters."""

    def __init__(self, module: nn.Module, task: AttributionTask) -> None:
        super().__init__()
        self.module = module
        self.task = task

    def forward(self, batch: Any) -> Tensor:
        return self.task.train_loss(self.module, batch)
