"""Modules under ``torch.compile``: their plain names, and running them without the compiler.

``torch.compile(module)`` wraps the module, so that its tensors are called ``_orig_mod.<name>``. A
recorded run says nothing of that: it can be attributed with the compiled and the plain module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

_WRAPPED = "_orig_mod"
_WRAPPERS = (_WRAPPED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """The tensor's name in the module as the user wrote it, without the wrappers' own parts."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's parameters by plain name."""
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


def plain_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The module's buffers by plain name."""
    return {plain_name(name): buffer for name, buffer in module.named_buffers()}


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper; itself where there is none."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    inner = module._modules.get(_WRAPPED)
    return module if inner is None else inner


@contextmanager
def run_eagerly(module: nn.Module) -> Iterator[None]:
    """Within it, nothing in ``module`` is compiled and all names are plain.

    Per-example gradients and losses are found by watching torch's functions, which compiled code
    does not call.
    """
    wrapped = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if child is not None and uncompiled(child) is not child and name != _WRAPPED
    ]
    called: list[tuple[nn.Module, Callable[..., object] | None]] = [
        (part, part._compiled_call_impl)
        for part in module.modules()
        if getattr(part, "_compiled_call_impl", None) is not None
    ]
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = uncompiled(child)
        for part, _ in called:
            part._compiled_call_impl = None  # type: ignore[assignment]
        with _force_eager():
            yield
    finally:
        for part, call in called:
            part._compiled_call_impl = call
        for parent, name, child in wrapped:
            parent._modules[name] = child


def _force_eager() -> AbstractContextManager[object]:
    """For compiled functions and methods; torch before 2.6 cannot switch them off."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")
