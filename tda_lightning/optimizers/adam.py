r"""``torch.optim.Adam`` and ``torch.optim.AdamW``, which differ in weight decay.

.. math::
    m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2,
    \quad \theta_t = \theta_{t-1} - \eta \frac{m_t / c_1}{\sqrt{v_t / c_2} + \epsilon}

with :math:`c_i = 1 - \beta_i^t`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

from tda_lightning.optimizers.rule import (
    Number,
    OptimizerRule,
    ParameterStep,
    Settings,
    States,
)

_FIRST, _SECOND = "exp_avg", "exp_avg_sq"


def _adjoint(a: Tensor, states: dict[str, Tensor], step: ParameterStep) -> Tensor:
    beta1, beta2, eps = (step.settings[name] for name in ("beta1", "beta2", "eps"))
    correction1, correction2 = 1 - beta1**step.count, 1 - beta2**step.count
    first, second = step.states[_FIRST], step.states[_SECOND]
    root = (second / correction2).sqrt()
    denominator = root + eps
    rate = step.rate / correction1
    moved = second != 0  # the others never had a gradient, and get no derivative
    through_root = first / (2 * correction2 * root * denominator**2)
    states[_FIRST].addcmul_(a, torch.where(moved, -rate / denominator, 0))
    states[_SECOND].addcmul_(a, torch.where(moved, rate * through_root, 0))
    u = (2 * (1 - beta2) * step.gradient) * states[_SECOND]
    u += (1 - beta1) * states[_FIRST]
    states[_FIRST] *= beta1
    states[_SECOND] *= beta2
    return u


def _advance(states: States, gradient: Tensor, settings: Settings) -> dict[str, Tensor]:
    beta1, beta2 = settings["beta1"], settings["beta2"]
    return {
        _FIRST: beta1 * states[_FIRST] + (1 - beta1) * gradient,
        _SECOND: beta2 * states[_SECOND] + (1 - beta2) * gradient**2,
    }


def _metric(states: States, settings: Settings, count: Number) -> Tensor:
    second = states[_SECOND]
    corrected = second / (1 - settings["beta2"] ** count)
    return torch.where(second > 0, 1 / (corrected.sqrt() + settings["eps"]), 0)


def _edge(settings: Settings, steps: int) -> float:
    """Descent by m <- beta1 m + (1 - beta1) g is stable up to 2 (1 + beta1) / (1 - beta1) (Cohen et
    al. 2022, 2207.14484). Half of it leaves room for the second moment's derivative, and decays as
    fast. Within the memory of m, single steps may be beyond."""
    beta1 = settings["beta1"]
    return (1 + beta1) / (1 - beta1) if steps * (1 - beta1) > 1 else math.inf


RULES = tuple(
    OptimizerRule(
        optimizer=optimizer,
        settings=("beta1", "beta2", "eps", "weight_decay"),
        states=(_FIRST, _SECOND),
        adjoint=_adjoint,
        reads=(_FIRST, _SECOND),
        reads_gradient=True,
        advance=_advance,
        metric=_metric,
        squares=(_SECOND, lambda settings: (settings["beta2"], 1 - settings["beta2"])),
        edge=_edge,
        decoupled=optimizer is AdamW,
        cancelling_steps=16,
        unsupported=("amsgrad", "maximize", "differentiable"),
    )
    for optimizer in (Adam, AdamW)
)
