"""Tiny trained runs: the examples carry their index, the module notes what it was given."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tda_lightning.recording import TrajectoryRecorder

# Waking a second thread takes longer than all the work of so small a model.
torch.set_num_threads(1)

Optimizers = Callable[[LightningModule], Any]


class Numbered(Dataset):
    """Examples (x, y, index); ``augment`` adds noise from all three global generators."""

    def __init__(self, size: int = 22, seed: int = 0, augment: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, 3, generator=generator)
        self.y = self.x.sum(1, keepdim=True).tanh()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = self.x[index]
        if self.augment:
            x = x + 0.1 * torch.randn(3) + 0.1 * random.random() + 0.1 * np.random.random()  # noqa: NPY002
        return x.float(), self.y[index], index


class Stream(IterableDataset):
    def __iter__(self):
        yield from (Numbered()[index] for index in range(22))


class Net(LightningModule):
    """A small regression network with everything that draws or counts: dropout, batch norm."""

    def __init__(self, optimizers: Optimizers | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1)
        )
        self.optimizers_of = optimizers or sgd
        self.seen: list[list[int]] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        self.seen.append(torch.as_tensor(index).reshape(-1).tolist())
        loss = nn.functional.mse_loss(self.net(x.reshape(-1, 3)), y.reshape(-1, 1))
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Lightning clips after this hook."""
        self.rates.append(optimizer.param_groups[0]["lr"])
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat([g.reshape(-1) for g in gradients]).norm()))

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


def sgd(module: LightningModule) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def adamw(module: LightningModule) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=0.01)


def scheduled(module: LightningModule) -> Any:
    """SGD in two groups under a rate that changes with every step."""
    weights = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 0.01}, {"params": others, "lr": 0.02}],
        lr=0.05,
        momentum=0.9,
        nesterov=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def loader(dataset: Any = None, batch_size: int | None = 4, **options: Any) -> DataLoader:
    return DataLoader(Numbered() if dataset is None else dataset, batch_size, **options)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    options = {"accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": False, **options}
    return Trainer(
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(
    path: Path | None,
    train: Any = None,
    *,
    module: LightningModule | None = None,
    optimizers: Optimizers | None = None,
    validation: Any = None,
    recorder: dict[str, Any] | None = None,
    callbacks: tuple[Any, ...] = (),
    **options: Any,
) -> Any:
    """Train with a fixed seed, recording to ``path`` unless it is None; returns the module.

    ``train`` is a loader, or a function that makes one after the seed is set.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        seed_everything(7, verbose=False)
        module = module or Net(optimizers)
        if train is None:
            train = loader(shuffle=True)
        train = train() if callable(train) else train
        recorders = [TrajectoryRecorder(path, **(recorder or {}))] if path else []
        trainer(*recorders, *callbacks, **options).fit(module, train, validation)
    return module
