r"""``torch.optim.Adagrad``.

.. math::
    v_t = v_{t-1} + g_t^2, \quad
    \theta_t = \theta_{t-1} - \frac{\eta}{1 + (t - 1) \kappa} \frac{g_t}{\sqrt{v_t} + \epsilon}

with :math:`\kappa` the decay of the rate (``lr_decay``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Adagrad

from tda_lightning.optimizers.rule import (
    Number,
    OptimizerRule,
    ParameterStep,
    Settings,
    States,
)

_SUM = "sum"


def _adjoint(a: Tensor, states: dict[str, Tensor], step: ParameterStep) -> Tensor:
    root = step.states[_SUM].sqrt()
    denominator = root + step.settings["eps"]
    rate = step.rate / (1 + (step.count - 1) * step.settings["lr_decay"])
    moved = root != 0  # the others never had a gradient, and get no derivative
    through_root = step.gradient / (2 * root * denominator**2)
    states[_SUM].addcmul_(a, torch.where(moved, rate * through_root, 0))
    u = torch.where(moved, -rate / denominator, 0) * a
    u += (2 * step.gradient) * states[_SUM]
    return u


def _metric(states: States, settings: Settings, _: Number) -> Tensor:
    total = states[_SUM]
    return torch.where(total > 0, 1 / (total.sqrt() + settings["eps"]), 0)


def _effective_rates(rates: Tensor, settings: Mapping[str, Tensor], before: Tensor) -> Tensor:
    return rates / (1 + before[:, None] * settings["lr_decay"])


RULES = (
    OptimizerRule(
        optimizer=Adagrad,
        settings=("lr_decay", "eps", "weight_decay", "initial_accumulator_value"),
        states=(_SUM,),
        adjoint=_adjoint,
        reads=(_SUM,),
        reads_gradient=True,
        metric=_metric,
        squares=(_SUM, lambda settings: (1.0, 1.0)),
        effective_rates=_effective_rates,
        cancelling_steps=16,
    ),
)
