"""What is fixed over a run, read from trainer and module when training starts."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from tda_lightning.optimizers import optimizer_name, read_hyperparameters, read_rates
from tda_lightning.recording.trained_parameters import TrainedParameters
from tda_lightning.recording.trainer_hooks import averaged_by
from tda_lightning.records.trajectory import Facts
from tda_lightning.runtime.compiled import plain_name
from tda_lightning.runtime.loading import TRANSFER_HOOKS, overrides

_GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step")
_PACKAGES = ("tda-lightning", "torch", "lightning", "h5py")


def read_facts(
    trainer: Trainer,
    trained: TrainedParameters,
    num_examples: int | None,
    fingerprint: Mapping[str, str] | None,
    settings: Mapping[str, Any],
) -> Facts:
    """The facts of the run that is about to start."""
    module, optimizer, loader = trained.module, trained.optimizer, trainer.train_dataloader
    algorithm = trainer.gradient_clip_algorithm or "norm"
    data_module = getattr(trainer, "datamodule", None)
    known = {
        "module": _path(module),
        "data_set": _path(getattr(loader, "dataset", loader)),
        "batch_size": getattr(loader, "batch_size", None),
        "loader_workers": getattr(loader, "num_workers", None),
        "data_module": None if data_module is None else _path(data_module),
        "transfer_hooks": {
            "module": _transfer_hooks(module),
            "data_module": _transfer_hooks(data_module),
        },
        "num_training_batches": _finite(trainer.num_training_batches),
        "log_every_n_steps": trainer.log_every_n_steps,  # type: ignore[attr-defined]
        "loggers": [_path(logger) for logger in trainer.loggers],
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
        "gradient_clip_algorithm": str(getattr(algorithm, "value", algorithm)),
        "clipping": clipping_kind(trainer, module),
        "averaging": averaged_by(trainer),
        "strategy": type(trainer.strategy).__name__,
        "device": str(trainer.strategy.root_device),
        "world_size": trainer.world_size,
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "versions": {"python": platform.python_version(), **package_versions("numpy")},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **settings,
    }
    return Facts(
        parameters=trained.facts(),
        optimizer=optimizer_name(optimizer),
        num_examples=num_examples,
        fingerprint=fingerprint,
        settings=known,
    )


def clipping_kind(trainer: Trainer, module: LightningModule) -> str:
    """What may change gradients between the backward pass and the step: "none", "norm" or "value"
    by the trainer's settings, "own", the module's own ``configure_gradient_clipping``, or "hooks",
    those of the module or of callbacks that see gradients."""
    if overrides(module, "configure_gradient_clipping"):
        return "own"
    if not trainer.gradient_clip_val:
        others = [c for c in vars(trainer)["callbacks"] if not _is_ours(c)]
        seen = any(overrides(one, hook) for one in (module, *others) for hook in _GRADIENT_HOOKS)
        return "hooks" if seen else "none"
    chosen = trainer.gradient_clip_algorithm
    return "norm" if chosen is None else str(getattr(chosen, "value", chosen))


def modules_in_eval_mode(module: nn.Module) -> list[str]:
    """Names of the parts in eval mode: frozen batch statistics, dropout that is off."""
    return [plain_name(name) for name, part in module.named_modules() if not part.training]


def package_versions(*more: str) -> dict[str, str]:
    """Versions of the packages that results depend on, and of ``more``."""
    return {package: _version(package) for package in (*_PACKAGES, *more)}


@cache  # read from the package's files
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _is_ours(callback: object) -> bool:
    return type(callback).__module__.partition(".")[0] == __name__.partition(".")[0]


def _transfer_hooks(thing: object) -> list[str]:
    return [] if thing is None else [name for name in TRANSFER_HOOKS if overrides(thing, name)]


def _finite(number: float) -> int | None:
    return int(number) if number != float("inf") else None


def _path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
