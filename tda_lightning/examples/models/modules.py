"""LightningModules of the examples: a network, a standard loss, an optimizer and a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


class TrainedModule(LightningModule):
    """A network with what it takes to train it; subclasses choose the loss.

    Args:
        network: maps a batch of inputs to outputs.
        optimizer: takes the parameters and gives the optimizer. Only training needs it.
        scheduler: takes the optimizer and the number of steps of the whole run; it moves after
            every step. None keeps the rate constant.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self._optimizer = optimizer
        self._scheduler = scheduler

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch."""
        raise NotImplementedError(f"{type(self).__name__} has no loss.")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        inputs, targets = batch
        loss = self.loss(self(inputs), targets)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        inputs, targets = batch
        outputs = self(inputs)
        self.log("val_loss", self.loss(outputs, targets), prog_bar=True, batch_size=len(inputs))
        for name, value in self.metrics(outputs, targets).items():
            self.log(name, value, prog_bar=True, batch_size=len(inputs))

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What else to tell of a validation batch."""
        return {}

    def configure_optimizers(self) -> Any:
        if self._optimizer is None:
            raise ValueError(
                f"{type(self).__name__} was made without an optimizer, so it cannot be trained. "
                "Pass one, for example optimizer=functools.partial(torch.optim.SGD, lr=0.1)."
            )
        optimizer = self._optimizer(self.parameters())
        if self._scheduler is None:
            return optimizer
        scheduler = self._scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Classifier(TrainedModule):
    """Cross-entropy of logits [batch, class] against class numbers [batch]."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"val_accuracy": (outputs.argmax(dim=1) == targets).float().mean()}


class Regressor(TrainedModule):
    """Mean squared error of outputs against targets, both [batch, output]."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)


class LanguageModel(TrainedModule):
    """Cross-entropy of the next token, averaged over all tokens of the batch.

    Inputs and targets are token numbers [batch, position], outputs [batch, position, token].
    """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
