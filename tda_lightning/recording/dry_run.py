"""One optimizer step without memory, to see which optimizer a module asks for and what it keeps.

The module's structure is copied with tensors on torch's meta device, which have shapes and no
memory; the copy configures its optimizer and makes one step. Module, random generators and
trainer are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from tda_lightning.optimizers import read_hyperparameters
from tda_lightning.recording.checks import require_one_optimizer
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.runtime.module_state import restored
from tda_lightning.runtime.random_states import unchanged_randomness

# Precisions for which Lightning changes the type of the weights themselves.
_PRECISIONS = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
_STEPS = 1000  # for schedules, where the true number is not known; no state depends on it


@dataclass(frozen=True)
class DryRun:
    """What training would hold. Tensors are on the meta device.

    Attributes:
        trained: parameters that the optimizer trains, by the module's names.
        others: frozen parameters and buffers.
        state_bytes: the optimizer's state after a step; None when it cannot be told.
        state_tensors: how many tensors that are.
        num_groups: parameter groups.
        num_hyperparameters: recorded settings of each.
        on_host: training will run on the processor.
        notes: what could not be told, and why.
    """

    trained: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    state_bytes: int | None
    state_tensors: int
    num_groups: int
    num_hyperparameters: int
    on_host: bool
    notes: tuple[str, ...] = ()


def dry_run(module: LightningModule, trainer: Trainer, steps: int | None) -> DryRun:
    """What training would hold, with ``steps`` optimizer steps ahead.

    Raises:
        UnsupportedTrainingError: the module configures no optimizer, or several.
    """
    tensors = _meta_tensors(module, _PRECISIONS.get(str(trainer.precision)))
    named = {name: tensors[id(p)] for name, p in module.named_parameters()}
    buffers = {name: tensors[id(b)] for name, b in module.named_buffers()}
    held = {id(tensors[id(p)]) for p in module.parameters() if p.requires_grad}
    groups, settings = 1, 4
    states: list[Tensor] | None = None
    notes: tuple[str, ...] = ()
    try:
        with restored(module, "requires_grad"), unchanged_randomness(module):
            optimizer = _optimizer(module, trainer, tensors, steps)
            groups, settings = len(optimizer.param_groups), len(read_hyperparameters(optimizer))
            held = {id(p) for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
            states = _state_tensors(optimizer)
    except UnsupportedTrainingError:
        raise
    except Exception as error:
        # Whatever the user's own code may raise before there is a run.
        notes = (
            "The optimizer's state is not known: configure_optimizers() or a step of its optimizer "
            f"fails before training ({type(error).__name__}: {error}).",
        )
    frozen = {name: p for name, p in named.items() if id(p) not in held}
    return DryRun(
        trained={name: p for name, p in named.items() if id(p) in held},
        others={**frozen, **buffers},
        state_bytes=None if states is None else sum(s.numel() * s.element_size() for s in states),
        state_tensors=len(states or ()),
        num_groups=groups,
        num_hyperparameters=settings,
        on_host=trainer.strategy.root_device.type == "cpu",
        notes=notes,
    )


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
