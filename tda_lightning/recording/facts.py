"""What is fixed over a run, read from trainer and module when training starts."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from tda_lightning.optimizers import optimizer_name, read_hyperparameters, read_rates
from tda_lightning.recording.stepping import clipping_kind
from tda_lightning.records.trajectory import Checkpoint, Facts, ParameterFact
from tda_lightning.runtime.compiled import plain_buffers, plain_name, plain_parameters

# Parameter and its group in the optimizer, by the module's names.
Trained = Mapping[str, tuple[nn.Parameter, int]]

_PACKAGES = ("tda-lightning", "torch", "lightning", "numpy", "h5py")


def read_checkpoint(
    step: int,
    module: nn.Module,
    optimizer: Optimizer,
    trained: Trained,
    with_optimizer: bool,
    random: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """The state after ``step`` steps; ``buffers`` has every tensor that no step moves.

    Frozen parameters are among them: without these the model cannot be rebuilt.
    """
    others = {**plain_parameters(module), **plain_buffers(module)}
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
        buffers={name: tensor for name, tensor in others.items() if name not in trained},
        optimizer=states,
        random=random,
    )


def read_facts(
    trainer: Trainer,
    module: LightningModule,
    trained: Trained,
    num_examples: int | None,
    fingerprint: Mapping[str, str] | None,
    settings: Mapping[str, Any],
) -> Facts:
    """The facts of the run that is about to start."""
    optimizer = trainer.optimizers[0]
    return Facts(
        parameters=parameter_facts(trained),
        optimizer=optimizer_name(optimizer),
        num_examples=num_examples,
        fingerprint=fingerprint,
        settings={**_settings(trainer, module, optimizer), **settings},
    )


def modules_in_eval_mode(module: nn.Module) -> list[str]:
    """Names of the parts that do not train: frozen batch statistics, dropout that is off."""
    return [plain_name(name) for name, part in module.named_modules() if not part.training]


def parameter_facts(trained: Trained) -> dict[str, ParameterFact]:
    """Shape, dtype and group of every trained parameter."""
    return {
        name: ParameterFact(
            tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), group
        )
        for name, (parameter, group) in trained.items()
    }


def _settings(trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> dict[str, Any]:
    loader = trainer.train_dataloader
    algorithm = trainer.gradient_clip_algorithm or "norm"
    return {
        "module": _path(module),
        "data_set": _path(getattr(loader, "dataset", loader)),
        "batch_size": getattr(loader, "batch_size", None),
        "loader_workers": getattr(loader, "num_workers", None),
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
