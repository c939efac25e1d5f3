"""What is fixed over a run, read from trainer and module when training starts."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from tda_lightning.callbacks.step_log import optimizer_name, read_hyperparameters, read_rates
from tda_lightning.errors import UnsupportedTrainingError
from tda_lightning.trajectory import Checkpoint, Facts, ParameterFact

_PACKAGES = ("tda-lightning", "torch", "lightning", "numpy", "h5py")


def trained_parameters(
    module: nn.Module, optimizer: Optimizer
) -> dict[str, tuple[nn.Parameter, int]]:
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
        name: (parameter, groups.pop(id(parameter)))
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


def read_checkpoint(
    step: int,
    module: nn.Module,
    optimizer: Optimizer,
    trained: Mapping[str, tuple[nn.Parameter, int]],
    with_optimizer: bool,
) -> Checkpoint:
    """The state after ``step`` steps; ``buffers`` has every tensor that no step moves.

    Frozen parameters are among them: without these the model cannot be rebuilt.
    """
    others = {n: p for n, p in module.named_parameters() if n not in trained}
    states = None
    if with_optimizer:
        states = {
            name: {
                key: value
                for key, value in optimizer.state.get(parameter, {}).items()
                if isinstance(value, Tensor)
            }
            for name, (parameter, _) in trained.items()
        }
    return Checkpoint(
        step=step,
        parameters={name: parameter.detach() for name, (parameter, _) in trained.items()},
        buffers={**others, **dict(module.named_buffers())},
        optimizer=states,
    )


def read_facts(
    trainer: Trainer,
    module: LightningModule,
    trained: Mapping[str, tuple[nn.Parameter, int]],
    num_examples: int | None,
    fingerprint: Mapping[str, str] | None,
    settings: Mapping[str, Any],
) -> Facts:
    """The facts of the run that is about to start."""
    optimizer = trainer.optimizers[0]
    return Facts(
        parameters={
            name: ParameterFact(
                tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), group
            )
            for name, (parameter, group) in trained.items()
        },
        optimizer=optimizer_name(optimizer),
        num_examples=num_examples,
        fingerprint=fingerprint,
        settings={**_settings(trainer, module, optimizer), **settings},
    )


def _settings(trainer: Trainer, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    loader = trainer.train_dataloader
    return {
        "module": _path(module),
        "data_set": _path(getattr(loader, "dataset", loader)),
        "batch_size": getattr(loader, "batch_size", None),
        "num_workers": getattr(loader, "num_workers", None),
        "optimizer_class": _path(optimizer),
        "optimizer_groups": [
            {"lr": rate, **{name: values[group] for name, values in hyper.items()}}
            for hyper in [read_hyperparameters(optimizer)]
            for group, rate in enumerate(read_rates(optimizer))
        ],
        "schedulers": [
            {"class": _path(config.scheduler), "interval": config.interval}
            for config in trainer.lr_scheduler_configs
        ],
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm or "norm"),
        "strategy": type(trainer.strategy).__name__,
        "device": str(trainer.strategy.root_device),
        "world_size": trainer.world_size,
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "versions": {"python": platform.python_version(), **_versions()},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
