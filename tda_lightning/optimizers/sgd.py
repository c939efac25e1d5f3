r"""``torch.optim.SGD``, with or without momentum.

.. math::
    m_t = \mu m_{t-1} + (1 - \tau) g_t, \qquad
    \theta_t = \theta_{t-1} - \eta m_t \quad (\text{Nesterov: } \eta (g_t + \mu m_t))

The buffer :math:`m` begins with the whole gradient, undamped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import SGD

from tda_lightning.optimizers.rule import OptimizerRule, ParameterStep, Settings, States

_BUFFER = "momentum_buffer"


def _adjoint(a: Tensor, states: dict[str, Tensor], step: ParameterStep) -> Tensor:
    rate, settings = step.rate, step.settings
    momentum, nesterov = settings["momentum"], bool(settings["nesterov"])
    if not momentum:
        return -rate * a
    new = _BUFFER in step.new_states
    buffer = states[_BUFFER]
    buffer -= (rate * momentum if nesterov else rate) * a
    u = (1 if new else 1 - settings["dampening"]) * buffer
    if nesterov:
        u -= rate * a
    if new:
        del states[_BUFFER]
    else:
        buffer *= momentum
    return u


def _advance(states: States, gradient: Tensor, settings: Settings) -> dict[str, Tensor]:
    if not settings["momentum"]:
        return {}
    if _BUFFER not in states:
        return {_BUFFER: gradient}
    scaled = (1 - settings["dampening"]) * gradient
    return {_BUFFER: settings["momentum"] * states[_BUFFER] + scaled}


def _effective_rates(rates: Tensor, settings: Mapping[str, Tensor], _: Tensor) -> Tensor:
    """eta (1 - tau) / (1 - mu), once the buffer is warm."""
    momentum, dampening = settings["momentum"], settings["dampening"]
    # torch.optim.SGD looks at dampening only when there is momentum.
    taken = torch.where(momentum > 0, 1 - dampening, torch.ones_like(dampening))
    return rates * taken / (1 - momentum)


RULES = (
    OptimizerRule(
        optimizer=SGD,
        settings=("momentum", "dampening", "nesterov", "weight_decay"),
        states=(_BUFFER,),
        adjoint=_adjoint,
        advance=_advance,
        effective_rates=_effective_rates,
        linear=True,
        remembers=lambda settings: bool(settings["momentum"].any()),
    ),
)
