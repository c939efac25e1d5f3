"""What a fit will be, before it begins: how many steps, by which optimizer, and what that keeps.

For the latter the module's structure is copied with tensors on torch's meta device, which have
shapes and no memory; the copy configures its optimizer and makes one step. Module, random
generators and trainer are left as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from tda_lightning.optimizers import read_hyperparameters
from tda_lightning.recording.checks import require_one_optimizer
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.runtime.module_state import restored
from tda_lightning.runtime.random_states import unchanged_randomness

# Precisions for which Lightning changes the type of the weights themselves.
_PRECISIONS = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
_STEPS = 1000  # for schedules, where the true number is not known; no state depends on it


@dataclass(frozen=True)
class StepCount:
    """What is known about the length of a run; None is not known."""

    total: int | None  # optimizer steps, if nothing stops the run early
    per_epoch: int | None
    accumulation: int  # batches in a step
    batch_size: int | None
    notes: tuple[str, ...] = ()  # why something is not known

    @property
    def epochs(self) -> int:
        """Epochs that are begun, at least one."""
        return math.ceil(self.total / self.per_epoch) if self.total and self.per_epoch else 1


def count_steps(trainer: Trainer, train: Any) -> StepCount:
    """Steps of a fit on ``train``: a loader, a data module, or None for the trainer's own, if any.

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


@dataclass(frozen=True)
class DryRun:
    """What training would hold. Tensors are on the meta device."""

    trained: Mapping[str, Tensor]  # parameters that the optimizer trains
    others: Mapping[str, Tensor]  # frozen parameters and buffers
    state: Sequence[Tensor] | None  # the optimizer's after a step; None when not known
    settings_per_step: int  # rates and settings of all parameter groups
    notes: tuple[str, ...] = ()  # what is not known, and why


def dry_run(module: LightningModule, trainer: Trainer, steps: int | None) -> DryRun:
    """What training would hold, with ``steps`` optimizer steps ahead.

    Raises:
        UnsupportedTrainingError: the module configures no optimizer, or several.
    """
    tensors = _meta_tensors(module, _PRECISIONS.get(str(trainer.precision)))
    named = {name: tensors[id(p)] for name, p in module.named_parameters()}
    buffers = {name: tensors[id(b)] for name, b in module.named_buffers()}
    held = {id(tensors[id(p)]) for p in module.parameters() if p.requires_grad}
    settings, state = 5, None
    notes: tuple[str, ...] = ()
    try:
        with restored(module, "requires_grad"), unchanged_randomness(module):
            optimizer = _optimizer(module, trainer, tensors, steps)
            groups = optimizer.param_groups
            settings = len(groups) * (1 + len(read_hyperparameters(optimizer)))
            held = {id(p) for g in groups for p in g["params"] if p.requires_grad}
            state = _state_tensors(optimizer)
    except UnsupportedTrainingError:
        raise
    except Exception as error:
        # Whatever the user's own code may raise before there is a run.
        notes = (
            "The optimizer's state is not known: configure_optimizers() or a step of its optimizer "
            f"fails before training ({type(error).__name__}: {error}).",
        )
    trained = {name: p for name, p in named.items() if id(p) in held}
    frozen = {name: p for name, p in named.items() if id(p) not in held}
    return DryRun(trained, {**frozen, **buffers}, state, settings, notes)


def _meta_tensors(module: nn.Module, dtype: torch.dtype | None) -> dict[int, Tensor]:
    """A twin without memory for every parameter and buffer, by the identity of the original."""
    twins: dict[int, Tensor] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        twin = torch.empty_like(tensor, device="meta")
        if dtype is not None and tensor.is_floating_point():
            twin = twin.to(dtype)
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        twins[id(tensor)] = twin
    return twins


def _optimizer(
    module: LightningModule, trainer: Trainer, twins: Mapping[int, Tensor], steps: int | None
) -> Optimizer:
    """The optimizer that ``configure_optimizers`` makes, holding twins of the parameters."""
    copied = _copy(module, twins, _BeforeFit(trainer, steps), {})
    optimizers = _optimizers(copied.configure_optimizers())
    require_one_optimizer(optimizers)
    for group in optimizers[0].param_groups:
        # A function that was bound to the module itself gives the parameters themselves.
        group["params"] = [twins.get(id(p), p) for p in group["params"]]
        if not all(p.is_meta for p in group["params"]):
            raise ValueError("the optimizer holds parameters that are not the module's")
    return optimizers[0]


def _optimizers(configured: Any) -> list[Optimizer]:
    """The optimizers in any of the forms that Lightning takes."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return _optimizers(configured.get("optimizer"))
    if isinstance(configured, (list, tuple)):
        return [optimizer for part in configured for optimizer in _optimizers(part)]
    return []


def _state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """The tensors that the optimizer keeps from one step to the next."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    states = optimizer.state.values()
    return [v for state in states for v in state.values() if isinstance(v, Tensor)]


def _copy(
    module: nn.Module, twins: Mapping[int, Tensor], trainer: Any, made: dict[int, nn.Module]
) -> Any:
    """The module's structure over twins; other attributes are shared."""
    if id(module) in made:
        return made[id(module)]
    copied = object.__new__(type(module))
    made[id(module)] = copied
    own = dict(vars(module))
    for kind in ("_parameters", "_buffers"):
        own[kind] = {name: twins.get(id(t)) for name, t in own[kind].items()}
    own["_modules"] = {
        name: None if part is None else _copy(part, twins, trainer, made)
        for name, part in own["_modules"].items()
    }
    if isinstance(module, LightningModule):
        own["_trainer"] = trainer
    vars(copied).update(own)
    return copied


class _BeforeFit:
    """The trainer as a module sees it in ``configure_optimizers``."""

    def __init__(self, trainer: Trainer, steps: int | None) -> None:
        vars(self)["_real"] = trainer
        vars(self)["estimated_stepping_batches"] = _STEPS if steps is None else steps

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_real"], name)
