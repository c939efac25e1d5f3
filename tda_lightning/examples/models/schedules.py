"""Learning-rate schedules over the whole run, moved after every optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR


def constant(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LRScheduler:
    """The optimizer's rate throughout, after a linear rise over the first ``warmup`` of the run."""
    return _shaped(optimizer, total_steps, warmup, lambda progress: 1.0)


def linear(
    optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0
) -> LRScheduler:
    """A straight line from the optimizer's rate to ``final`` times it."""
    return _shaped(optimizer, total_steps, warmup, lambda progress: 1 - (1 - final) * progress)


def cosine(
    optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0
) -> LRScheduler:
    """Half a cosine from the optimizer's rate to ``final`` times it."""
    return _shaped(
        optimizer,
        total_steps,
        warmup,
        lambda progress: final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2,
    )


def one_cycle(
    optimizer: Optimizer,
    total_steps: int,
    warmup: float = 0.3,
    start: float = 0.04,
    final: float = 0.0001,
    cycle_momentum: bool = False,
) -> LRScheduler:
    """Up to the optimizer's rate and down again (Smith & Topin, 2018), by torch's OneCycleLR.

    Args:
        optimizer: its rate is the peak.
        total_steps: optimizer steps of the whole run.
        warmup: part of the run that rises.
        start: first rate, as a fraction of the peak.
        final: last rate, as a fraction of the peak.
        cycle_momentum: move momentum (or beta1) the other way.
    """
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=warmup,
        div_factor=1 / start,
        final_div_factor=start / final,
        cycle_momentum=cycle_momentum,
    )


def _shaped(
    optimizer: Optimizer, total_steps: int, warmup: float, shape: Callable[[float], float]
) -> LRScheduler:
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is a part of the run, in [0, 1), got {warmup}.")
    rising = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return shape(min(1.0, (step - rising) / max(1, total_steps - rising)))

    return LambdaLR(optimizer, factor)
