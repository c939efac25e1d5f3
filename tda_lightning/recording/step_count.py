"""How many optimizer steps a trainer will make, before it has begun."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from tda_lightning.runtime.random_states import unchanged_randomness


@dataclass(frozen=True)
class StepCount:
    """What is known about the length of a run; None is not known.

    Attributes:
        total: optimizer steps, if nothing stops the run early.
        per_epoch: those of one epoch.
        accumulation: batches in a step.
        batch_size: examples in a batch.
        notes: why something is not known.
    """

    total: int | None
    per_epoch: int | None
    accumulation: int
    batch_size: int | None
    notes: tuple[str, ...] = ()

    @property
    def epochs(self) -> int:
        """Epochs that are begun, at least one."""
        return math.ceil(self.total / self.per_epoch) if self.total and self.per_epoch else 1


def count_steps(trainer: Trainer, train: Any) -> StepCount:
    """Steps of a fit.

    Args:
        trainer: with its limits.
        train: a loader or a data module; None for the one attached to the trainer, if any.

    Raises:
        TypeError: ``train`` is neither.
    """
    with unchanged_randomness(train):
        loader = _loader(trainer, train)
    notes = []
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if loader is not None and size is None:
        notes.append("The loader does not tell its batch size: example indices are not counted.")
    batches = None if loader is None else _batches(trainer, loader)
    if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # type: ignore[attr-defined]
        notes.append("Accumulation changes between epochs: the number of steps is not known.")
        batches = None
    elif loader is None:
        notes.append(
            "No training data are given: pass the loader or the data module as train=..., to know "
            "the number of steps and the size of the steps table."
        )
    elif batches is None:
        notes.append("The loader has no length: the number of steps is not known.")
    accumulation, limit = trainer.accumulate_grad_batches, trainer.max_steps
    given = limit if limit >= 0 else None
    if batches is None:
        return StepCount(given, None, accumulation, size, tuple(notes))
    per_epoch, epochs = math.ceil(batches / accumulation), trainer.max_epochs
    if epochs is None:
        # Lightning's own default where nothing else limits the run.
        epochs = 1000 if given is None and trainer.max_time is None else -1  # type: ignore[attr-defined]
    limits = [given] if epochs < 0 else [given, per_epoch * epochs]
    total = min((steps for steps in limits if steps is not None), default=None)
    if total is None:
        notes.append("The run has no limit but time: the number of steps is not known.")
    return StepCount(total, per_epoch, accumulation, size, tuple(notes))


def _loader(trainer: Trainer, train: Any) -> Any:
    if train is None:
        attached = trainer.train_dataloader  # made by a fit that is under way or over
        train = attached if attached is not None else getattr(trainer, "datamodule", None)
    if isinstance(train, LightningDataModule):
        # A copy: the fit that follows must not find what setup leaves behind.
        train = copy.copy(train)
        train.setup("fit")
        train = train.train_dataloader()
    if train is None or isinstance(train, DataLoader) or hasattr(train, "__iter__"):
        return train
    raise TypeError(
        f"train must be a training loader or a LightningDataModule, got {type(train).__name__}."
    )


def _batches(trainer: Trainer, loader: Any) -> int | None:
    """Batches of an epoch, limited as the trainer limits them; None when there is no length."""
    limit = trainer.limit_train_batches
    try:
        length: float = len(loader)
    except (TypeError, NotImplementedError):
        return limit if isinstance(limit, int) else None
    if trainer.world_size > 1 and getattr(loader, "batch_sampler", None) is not None:
        length = math.ceil(length / trainer.world_size)
    return min(int(length), limit) if isinstance(limit, int) else int(length * limit)
