"""What the recorder can record, checked before and while it does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from tda_lightning.callbacks.facts import Trained
from tda_lightning.callbacks.processes import require_recordable
from tda_lightning.callbacks.sharded import plain_name
from tda_lightning.errors import UnsupportedTrainingError


def require_supported(trainer: Trainer, module: LightningModule) -> None:
    """Check what is known before optimizers and loaders exist."""
    if not module.automatic_optimization:
        raise UnsupportedTrainingError(
            "TrajectoryRecorder records automatic optimization with one optimizer, got "
            "automatic_optimization=False (manual optimization). Let Lightning step the "
            "optimizer, or train without the recorder."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise UnsupportedTrainingError(
            "training_step takes a dataloader_iter and fetches batches itself, so they cannot "
            "be told apart; expected training_step(self, batch, batch_idx)."
        )
    require_recordable(trainer)


def require_one_optimizer(trainer: Trainer) -> None:
    if len(trainer.optimizers) != 1:
        raise UnsupportedTrainingError(
            f"TrajectoryRecorder records one optimizer, got {len(trainer.optimizers)} optimizers "
            "from configure_optimizers(). Use one, with a parameter group for each setting."
        )


def indices_ended(reason: str) -> UnsupportedTrainingError:
    """Earlier batches had their indices, this one has not."""
    return UnsupportedTrainingError(
        f"Example indices ended in mid-training: {reason}. Expected one kind of batch "
        "throughout; use a sampler of integer positions for all of them."
    )


def require_same_parameters(trainer: Trainer, recorded: Sequence[nn.Parameter]) -> None:
    """Check that the optimizer still trains what it trained when recording began."""
    groups = trainer.optimizers[0].param_groups
    held = {id(p) for group in groups for p in group["params"] if p.requires_grad}
    if held != {id(p) for p in recorded}:
        raise UnsupportedTrainingError(
            f"The set of trained parameters changed after step {trainer.global_step}: expected "
            f"the {len(recorded)} that training began with, got {len(held)}. Freeze and unfreeze "
            "between fits, and record each fit in its own folder."
        )


def trained_parameters(module: nn.Module, optimizer: Optimizer) -> Trained:
    """(parameter, group) by the module's names: what the optimizer holds and trains.

    Raises:
        UnsupportedTrainingError: the optimizer trains a parameter that is not the module's, or
            nothing at all.
    """
    groups = {
        id(parameter): number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if parameter.requires_grad
    }
    trained = {
        plain_name(name): (parameter, groups.pop(id(parameter)))
        for name, parameter in module.named_parameters()
        if id(parameter) in groups
    }
    if groups:
        raise UnsupportedTrainingError(
            f"The optimizer trains {len(groups)} parameters that are not among the module's "
            f"named_parameters() (in parameter groups {sorted(set(groups.values()))}); expected "
            "all of them there. Register them in the LightningModule."
        )
    if not trained:
        raise UnsupportedTrainingError(
            "The optimizer trains no parameter: each one it holds has requires_grad=False, "
            "expected at least one to record."
        )
    return trained


def training_loader(trainer: Trainer) -> Any:
    """The one training loader.

    Raises:
        UnsupportedTrainingError: there are several, or its batches come out of order.
    """
    loader = trainer.train_dataloader
    if isinstance(loader, (CombinedLoader, list, tuple, Mapping)):
        flat = loader.flattened if isinstance(loader, CombinedLoader) else loader
        raise UnsupportedTrainingError(
            f"Training uses a collection of {len(flat)} loaders ({type(loader).__name__}), "
            "expected a single DataLoader, so that each batch has one list of example indices. "
            "Join the data sets, for instance with torch.utils.data.ConcatDataset."
        )
    if isinstance(loader, DataLoader) and loader.num_workers and not _in_order(loader):
        raise UnsupportedTrainingError(
            "The training DataLoader has in_order=False: its batches arrive in another order "
            "than their indices are drawn, so they cannot be told apart. Set in_order=True."
        )
    return loader


def _in_order(loader: DataLoader) -> bool:
    return getattr(loader, "in_order", True)  # torch before 2.6 knows no other way
