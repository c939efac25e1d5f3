r"""``torch.optim.RMSprop``, centered or not, with or without momentum.

.. math::
    v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \quad
    d_t = \frac{g_t}{\sqrt{v_t - \bar g_t^2} + \epsilon}, \quad
    b_t = \mu b_{t-1} + d_t, \quad \theta_t = \theta_{t-1} - \eta b_t

where :math:`\bar g_t = \alpha \bar g_{t-1} + (1 - \alpha) g_t` when centered, else 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import RMSprop

from tda_lightning.optimizers.rule import (
    Number,
    OptimizerRule,
    ParameterStep,
    Settings,
    States,
)

_SQUARE, _MEAN, _BUFFER = "square_avg", "grad_avg", "momentum_buffer"


def _adjoint(a: Tensor, states: dict[str, Tensor], step: ParameterStep) -> Tensor:
    alpha, eps, momentum = (step.settings[name] for name in ("alpha", "eps", "momentum"))
    centered = bool(step.settings["centered"])
    root = _variance(step.states, centered).sqrt()
    denominator = root + eps
    moved = root != 0  # the others never had a gradient, and get no derivative
    # Of d, which the parameters are stepped by.
    direction = -step.rate * a
    if momentum:
        states[_BUFFER] += direction
        direction = states[_BUFFER].clone()
        states[_BUFFER] *= momentum
    to_variance = torch.where(moved, -step.gradient / (2 * root * denominator**2), 0)
    states[_SQUARE].addcmul_(direction, to_variance)
    u = torch.where(moved, 1 / denominator, 0) * direction
    u += (2 * (1 - alpha) * step.gradient) * states[_SQUARE]
    states[_SQUARE] *= alpha
    if centered:
        states[_MEAN].addcmul_(direction, -2 * step.states[_MEAN] * to_variance)
        u += (1 - alpha) * states[_MEAN]
        states[_MEAN] *= alpha
    return u


def _variance(states: States, centered: bool) -> Tensor:
    """What the root is taken of."""
    return states[_SQUARE] - states[_MEAN] ** 2 if centered else states[_SQUARE]


def _metric(states: States, settings: Settings, _: Number) -> Tensor:
    root = _variance(states, bool(settings["centered"])).clamp(min=0).sqrt()
    return torch.where(states[_SQUARE] > 0, 1 / (root + settings["eps"]), 0)


def _effective_rates(rates: Tensor, settings: Mapping[str, Tensor], _: Tensor) -> Tensor:
    """eta / (1 - mu), once the buffer is warm."""
    return rates / (1 - settings["momentum"])


RULES = (
    OptimizerRule(
        optimizer=RMSprop,
        settings=("alpha", "eps", "weight_decay", "momentum", "centered"),
        states=(_SQUARE, _BUFFER, _MEAN),
        adjoint=_adjoint,
        reads=(_SQUARE, _MEAN),
        reads_gradient=True,
        metric=_metric,
        squares=(_SQUARE, lambda settings: (settings["alpha"], 1 - settings["alpha"])),
        effective_rates=_effective_rates,
        cancelling_steps=16,
    ),
)
