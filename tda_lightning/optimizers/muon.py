r"""``torch.optim.Muon``: momentum whose singular values are all brought near 1.

.. math::
    m_t = \mu m_{t-1} + (1 - \mu) g_t, \quad x_t = m_t \;
    (\text{Nesterov: } \mu m_t + (1 - \mu) g_t), \quad
    \theta_t = \theta_{t-1} - \eta\, r(\text{shape})\, O(x_t)

:math:`O` is a Newton-Schulz iteration, a polynomial in :math:`x / |x|` that sends singular values
to about 1, and :math:`r` a factor that depends on the parameter's shape.

torch.optim runs the iteration in bfloat16, so its result is a step function of the gradient: the
derivative is zero wherever it exists. The adjoint is that of the polynomial without rounding, at
the momentum of the run. Measured on an MLP of width 32 (16 steps, weights of examples changed by
10% either way and the run trained again), its scores correlate with the changes at 0.997; autograd
through the rounded iteration gives 0.995, and differs from it by 4%. Changes of 0.1% measure
nothing but the rounding.

There is no metric: orthogonalisation turns a gradient by the singular vectors of the momentum,
which no constant matrix P does.

References:
    | Muon: An optimizer for hidden layers in neural networks (Jordan et al., 2024)
    | https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vjp, vmap

from tda_lightning.optimizers.rule import OptimizerRule, ParameterStep

_BUFFER = "momentum_buffer"
_COEFFICIENTS = ("ns_coefficient1", "ns_coefficient2", "ns_coefficient3")


def _adjoint(a: Tensor, states: dict[str, Tensor], step: ParameterStep) -> Tensor:
    settings = {name: float(value) for name, value in step.settings.items()}
    momentum, nesterov = settings["momentum"], bool(settings["nesterov"])
    update = step.states[_BUFFER]
    if nesterov:
        update = torch.lerp(step.gradient, update, momentum)
    pull: Callable[[Tensor], tuple[Tensor]] = vjp(_orthogonaliser(settings), update)[1]
    ratio = _ratio(a.shape[-2], a.shape[-1], settings["adjust_lr_fn"])
    direction = vmap(pull)(-step.rate * ratio * a)[0]
    buffer = states[_BUFFER]
    buffer.add_(direction, alpha=momentum if nesterov else 1)
    u = (1 - momentum) * buffer
    if nesterov:
        u += (1 - momentum) * direction
    buffer *= momentum
    return u


def _orthogonaliser(settings: dict[str, float]) -> Callable[[Tensor], Tensor]:
    """torch.optim's iteration, in the precision of its input."""
    a, b, c = (settings[name] for name in _COEFFICIENTS)
    eps, count = settings["eps"], int(settings["ns_steps"])

    def orthogonalise(matrix: Tensor) -> Tensor:
        tall = matrix.shape[0] > matrix.shape[1]
        x: Tensor = matrix.T if tall else matrix
        x = x / torch.linalg.vector_norm(x).clamp(min=eps)
        for _ in range(count):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if tall else x

    return orthogonalise


def _ratio(rows: int, columns: int, kind: float) -> float:
    """What the rate is multiplied by, for a position in ``_ADJUSTMENTS``."""
    if _ADJUSTMENTS[int(kind)] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


_ADJUSTMENTS = (None, "original", "match_rms_adamw")

# torch before 2.9 has no Muon.
RULES = (
    (
        OptimizerRule(
            optimizer=torch.optim.Muon,
            settings=(
                "momentum",
                "nesterov",
                "weight_decay",
                "eps",
                "ns_steps",
                *_COEFFICIENTS,
                "adjust_lr_fn",
            ),
            states=(_BUFFER,),
            adjoint=_adjoint,
            reads=(_BUFFER,),
            reads_gradient=True,
            elementwise=False,
            decoupled=True,
            choices={"adjust_lr_fn": _ADJUSTMENTS},
        ),
    )
    if hasattr(torch.optim, "Muon")
    else ()
)
