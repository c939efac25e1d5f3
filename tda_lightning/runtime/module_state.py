"""Modules made ready for attribution, and put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from tda_lightning.runtime.compiled import run_eagerly
from tda_lightning.runtime.silence import silenced


@contextmanager
def prepared(modules: Sequence[nn.Module], device: torch.device | None = None) -> Iterator[None]:
    """Eval mode and silent logging, on ``device``; weights, buffers, modes and device as before at
    the end."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(run_eagerly(module))
            stack.enter_context(_one_prepared(module, device))
        yield


@contextmanager
def _one_prepared(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    before = {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}
    home = next(module.parameters()).device
    module.eval()
    try:
        # Plans place their tensors where the module is, so it moves before Lightning moves it.
        module.to(device or home)
        with silenced(module):
            yield
    finally:
        module.to(home)
        with torch.no_grad():
            # By name: moving a module replaces its buffers.
            for name, tensor in _tensors(module).items():
                tensor.copy_(before[name])
        for part, mode in modes.items():
            part.training = mode


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def load_tensors(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy parameters and buffers into the module, by name."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
