"""What a segment of training does along one eigenvector of curvature, as functions of its
eigenvalue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tda_lightning.optimizers import OptimizerRule, ParameterStep

SpectralFunction = Callable[[Tensor], Tensor]


def segment_decay(time: float) -> SpectralFunction:
    r"""How much of a perturbation is left after a segment.

    .. math::
        S(\sigma) = \exp(-\tau \sigma), \qquad \tau = \bar\eta K

    References:
        | Training Data Attribution via Approximate Unrolling (Bae et al., 2024), section 3.2
        | https://arxiv.org/abs/2405.12186

    Example:
        >>> segment_decay(time=1.0)(torch.tensor([0.0, 1.0]))
        tensor([1.0000, 0.3679])
    """
    return lambda eigenvalues: torch.exp(-time * eigenvalues)


def segment_response(time: float) -> SpectralFunction:
    r"""How far a constant gradient carries the parameters over one segment.

    .. math::
        F(\sigma) = \frac{1 - \exp(-\tau \sigma)}{\sigma}, \qquad \tau = \bar\eta K

    It tends to :math:`\tau` (a TracIn weight) as :math:`\sigma \to 0`, and to
    :math:`1 / \sigma` (an undamped influence function) as :math:`\tau \to \infty`.

    References:
        | Training Data Attribution via Approximate Unrolling (Bae et al., 2024), section 3.2
        | https://arxiv.org/abs/2405.12186

    Example:
        >>> segment_response(time=1.0)(torch.tensor([0.0, 1.0, 100.0]))
        tensor([1.0000, 0.6321, 0.0100])
    """

    def respond(eigenvalues: Tensor) -> Tensor:
        exponent = time * eigenvalues
        # expm1 keeps the digits that 1 - exp(-x) loses near zero, where F is about time.
        curved = -torch.expm1(-exponent) / eigenvalues
        straight = time * (1 - exponent / 2)
        return torch.where(exponent.abs() > 1e-6, curved, straight)

    return respond


def accumulated_response(time: float) -> SpectralFunction:
    r"""The segment's response, added up over its time.

    .. math::
        \int_0^\tau \frac{1 - \exp(-s \sigma)}{\sigma} ds
        = \frac{\tau - F(\sigma)}{\sigma}, \qquad \tau = \bar\eta K

    It tends to :math:`\tau^2 / 2` as :math:`\sigma \to 0`.

    Example:
        >>> accumulated_response(time=1.0)(torch.tensor([0.0, 1.0, 100.0]))
        tensor([0.5000, 0.3679, 0.0099])
    """

    def respond(eigenvalues: Tensor) -> Tensor:
        exponent = time * eigenvalues
        curved = (time - segment_response(time)(eigenvalues)) / eigenvalues
        # The difference loses digits near zero, where four terms of the series have them all.
        straight = time**2 * (1 / 2 - exponent / 6 + exponent**2 / 24 - exponent**3 / 120)
        return torch.where(exponent.abs() > 1e-3, curved, straight)

    return respond


class MomentumAdjoint:
    """The adjoint of an optimizer whose steps are linear in the gradients, backwards through its
    steps, by eigenvalue.

    The state is the pair (a, b) of docs/methods.md, "Exact unrolling": the adjoints of the
    parameter and of the optimizer's one state, the momentum buffer. It is linear in the state that
    enters at the segment's end, so it is kept as coefficients of that: ``a`` and ``b`` are each
    two tensors, the factors of the entering a and of the entering b.
    """

    def __init__(self, eigenvalues: Tensor, rule: OptimizerRule) -> None:
        assert rule.linear and len(rule.states) <= 1
        self.eigenvalues, self.rule = eigenvalues, rule
        one, zero = torch.ones_like(eigenvalues), torch.zeros_like(eigenvalues)
        self.a = torch.stack([one, zero])
        self._states = {name: torch.stack([zero, one]) for name in rule.states}

    @property
    def b(self) -> Tensor:
        """Coefficients of the buffer's adjoint."""
        return next(iter(self._states.values()), torch.zeros_like(self.a))

    def step(self, step: ParameterStep, clipping: float = 1.0) -> Tensor:
        """Go one step back.

        Args:
            clipping: what the step's gradient was multiplied by.

        Returns:
            The coefficients of u, with which the step's gradients enter:
            s[q, n] -= share(n) u . g_n.
        """
        assert self.rule.adjoint is not None
        u = clipping * self.rule.adjoint(self.a, self._states, step)
        self.a = self.a + self.eigenvalues * u
        return u
