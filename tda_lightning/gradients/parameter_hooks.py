"""Hooks that a module has on its parameters' gradients: training stepped with what they left.

A hook that leaves entries of the gradient out (``register_hook(lambda g: g * mask)``) freezes these
entries, for every example alike. Any other change of the batch's gradient (a factor, clipping,
normalising) is refused: scores take the gradient of a single example, and of the measurement, in
which such a hook has no part or another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tda_lightning.records.errors import EngineError


def kept_entries(name: str, parameter: nn.Parameter) -> Tensor | None:
    """1 where the parameter's hooks keep the gradient and 0 where they leave it out; None where
    they keep all.

    Raises:
        EngineError: they do something else.
    """
    hooks: Iterable[Callable[..., Tensor | None]] = (
        getattr(parameter, "_backward_hooks", None) or {}
    ).values()
    later = (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()
    if not hooks and not later:
        return None

    def after(gradient: Tensor) -> Tensor:
        for hook in hooks:
            changed = hook(gradient.clone())
            gradient = gradient if changed is None else changed
        for hook in later:
            copy = nn.Parameter(parameter.detach().clone())
            copy.grad = gradient.clone()
            hook(copy)
            if copy.grad is None or not torch.equal(copy, parameter):
                raise EngineError(f"a hook on {name} takes the step itself")
            gradient = copy.grad
        return gradient

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    probes = [(noise * scale).to(parameter) for scale in (1.0, -1e3, 1e-3)]
    try:
        with torch.no_grad():
            ones = after(torch.ones_like(parameter))
            found = [after(probe) for probe in probes]
    except Exception as error:
        raise EngineError(
            f"Parameter {name} has a hook on its gradient that cannot be followed ({error}). "
            "Remove it, or restrict attribution to other layers (task.layers)."
        ) from error
    if not all(
        torch.allclose(value, ones * probe, rtol=1e-4, atol=0)
        for value, probe in zip(found, probes, strict=True)
    ):
        raise EngineError(
            f"Parameter {name} has a hook on its gradient that does more than leave entries out "
            "(it clips, normalises or mixes them). What training stepped with is then a function "
            "of a whole batch's gradient, and no sum over examples. Use "
            "Trainer(gradient_clip_val=...), which is recorded, or restrict attribution to other "
            "layers (task.layers)."
        )
    if not bool(((ones == 0) | (ones == 1)).all()):
        raise EngineError(
            f"Parameter {name} has a hook that multiplies its gradient. Attribution does not "
            "follow it: put the factor into the parameter's learning rate (a parameter group of "
            "its own), which is recorded."
        )
    if bool((ones == 1).all()):
        return None
    if later:
        raise EngineError(
            f"Parameter {name} has a register_post_accumulate_grad_hook that leaves entries of its "
            "gradient out. Use register_hook, which backward passes of all kinds run."
        )
    return ones
