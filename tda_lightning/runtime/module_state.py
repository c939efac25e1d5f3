"""A module is changed within a ``with`` block, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tda_lightning.runtime.checkpointing import without_reentrant_checkpoints
from tda_lightning.runtime.compiled import run_eagerly
from tda_lightning.runtime.origins import inherit
from tda_lightning.runtime.silence import silenced
from tda_lightning.runtime.stand_in import stand_in_for_trainer
from tda_lightning.runtime.structures import mapped

Part = Literal["modes", "requires_grad", "gradients", "parameters", "buffers"]


@contextmanager
def restored(module: nn.Module, *parts: Part) -> Iterator[None]:
    """Put parts of the module's state back at the end.

    Gradients are set aside meanwhile, so that none is added to.

    Args:
        module: what may be changed inside the block.
        parts: what is put back; everything by default.
    """
    chosen = parts or get_args(Part)
    modules = list(module.modules()) if {"modes", "buffers"}.intersection(chosen) else []
    parameters = (
        list(module.parameters()) if {"requires_grad", "gradients"}.intersection(chosen) else []
    )
    modes = {part: part.training for part in modules if "modes" in chosen}
    required = {p: p.requires_grad for p in parameters if "requires_grad" in chosen}
    gradients = {p: p.grad for p in parameters if "gradients" in chosen}
    values: dict[str, Tensor | None] = dict.fromkeys(_empty_buffers(module, chosen))
    values |= {name: tensor.detach().clone() for name, tensor in _values(module, chosen).items()}
    for parameter in gradients:
        parameter.grad = None
    persistence = {
        part: set(part._non_persistent_buffers_set) for part in modules if "buffers" in chosen
    }
    with ExitStack() as stack:  # each part is put back, whatever becomes of another
        stack.callback(_set, "training", modes)
        stack.callback(_set, "grad", gradients)
        stack.callback(_set, "requires_grad", required)
        stack.callback(_set, "_non_persistent_buffers_set", persistence)
        stack.callback(_put_back, module, chosen, values)
        yield


def _set(attribute: str, values: Mapping[Any, object]) -> None:
    for owner, value in values.items():
        setattr(owner, attribute, value)


def _put_back(
    module: nn.Module, chosen: Sequence[Part], values: Mapping[str, Tensor | None]
) -> None:
    """Give tensors their earlier values. A buffer may have been replaced by one of another shape,
    and one that was not there is taken away."""
    # By name: moving a module replaces its buffers. Through .data: a backward pass that is still to
    # come may have saved them.
    found = _values(module, chosen)
    for name in values.keys() | found.keys():
        path, _, own = name.rpartition(".")
        now, before = found.get(name), values.get(name)
        if now is not None and before is not None and now.shape == before.shape:
            now.data.copy_(before)
        elif isinstance(now, nn.Parameter) and before is not None:
            now.data = before
        elif not isinstance(now, nn.Parameter):
            owner = module.get_submodule(path)
            if name in values:
                owner._buffers[own] = before
            else:
                delattr(owner, own)


def _values(module: nn.Module, chosen: Sequence[Part]) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters()) if "parameters" in chosen else {}
    buffers = dict(module.named_buffers()) if "buffers" in chosen else {}
    return {**parameters, **buffers}


def _empty_buffers(module: nn.Module, chosen: Sequence[Part]) -> Iterator[str]:
    """Names of the buffers that are None, which ``named_buffers`` leaves out."""
    if "buffers" in chosen:
        for path, part in module.named_modules():
            for name, buffer in part._buffers.items():
                if buffer is None:
                    yield f"{path}.{name}" if path else name


@contextmanager
def borrowed(module: nn.Module) -> Iterator[None]:
    """Run a module outside of training: nothing is compiled, checkpointed in the reentrant way or
    logged, a stand-in takes the place of the trainer, and its whole state is put back at the
    end."""
    plain = (run_eagerly(module), without_reentrant_checkpoints())
    with plain[0], plain[1], restored(module), silenced(module), stand_in_for_trainer(module):
        yield


@contextmanager
def in_eval_mode(
    modules: Sequence[nn.Module], device: torch.device | None = None
) -> Iterator[None]:
    """Borrow modules in eval mode, on ``device``; the device is put back too."""
    with ExitStack() as stack:
        for module in modules:
            home = next(module.parameters()).device
            stack.enter_context(borrowed(module))
            stack.callback(module.to, home)
            # Plans place their tensors where the module is, so it moves before Lightning moves it.
            module.eval().to(device or home)
        yield


def load_tensors(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy parameters and buffers into the module, by name."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


@contextmanager
def in_double(module: nn.Module) -> Iterator[None]:
    """Weights and buffers in float64; at the end the very tensors of before."""
    parameters = [(p, p.data) for p in module.parameters() if p.is_floating_point()]
    buffers = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    try:
        for parameter, value in parameters:
            parameter.data = value.double()
        for part, name, buffer in buffers:
            part._buffers[name] = buffer.double()
        yield
    finally:
        for parameter, value in parameters:
            parameter.data = value
        for part, name, buffer in buffers:
            part._buffers[name] = buffer


def doubled(batch: Any) -> Any:
    """A batch with its floating-point tensors in float64."""
    changed = mapped(lambda part: part.double() if part.is_floating_point() else part, batch)
    inherit(batch, changed, doubled)
    return changed
