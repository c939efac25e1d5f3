"""Did the optimizer really step, and with which gradients?

Lightning's own count of steps moves on when a gradient scaler skips one, so the optimizer itself is
asked, through torch.optim's hooks. Clipping comes between Lightning's last hook and the optimizer's
arithmetic, which may write into the gradients (``foreach`` SGD with Nesterov momentum does): the
one moment at which clipped gradients can be measured is right before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer


def clipping_kind(trainer: Trainer, module: LightningModule) -> str:
    """What may clip gradients: "none", "norm" or "value" by the trainer's settings, or "own", the
    module's own ``configure_gradient_clipping``."""
    own = getattr(module.configure_gradient_clipping, "__func__", None)
    if own is not LightningModule.configure_gradient_clipping:
        return "own"
    if not trainer.gradient_clip_val:
        return "none"
    chosen = trainer.gradient_clip_algorithm
    return "norm" if chosen is None else str(getattr(chosen, "value", chosen))


class OptimizerHooks:
    """Hooks into the optimizer of one fit.

    Args:
        trainer: whose optimizer exists.
        measure: the gradient's norm; called right before each step where something may clip.

    Attributes:
        applied_norm: of the gradient that the last step used; None where nothing clips.
    """

    def __init__(self, trainer: Trainer, measure: Callable[[], Tensor]) -> None:
        optimizer = trainer.optimizers[0]
        self.applied_norm: Tensor | None = None
        self._measure = measure
        self._stepped = False
        self._clips = clipping_kind(trainer, trainer.lightning_module) != "none"
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def took_step(self) -> bool:
        """Whether the optimizer has stepped since this was last asked."""
        stepped, self._stepped = self._stepped, False
        return stepped

    def _before(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure")
        if not self._clips:
            return None
        if closure is None:
            self.applied_norm = self._measure()
            return None

        # Lightning computes and clips the gradients inside the closure.
        def measured() -> Any:
            result = closure()
            self.applied_norm = self._measure()
            return result

        return args, {**kwargs, "closure": measured}

    def _after(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        # A fused optimizer under a gradient scaler is called all the same and skips inside.
        skipped = getattr(optimizer, "found_inf", None)
        self._stepped = has_gradients(optimizer) and not (skipped is not None and bool(skipped))


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether there is any: without one, no torch optimizer moves anything."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def unscaled(norm: Tensor, trainer: Trainer) -> Tensor:
    """The norm without a gradient scaler's factor, which fused optimizers take out themselves."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    fused = getattr(trainer.optimizers[0], "_step_supports_amp_scaling", False)
    if scaler is None or not fused:
        return norm
    return norm / scaler.scale(torch.ones_like(norm))  # get_scale() would wait for the device
