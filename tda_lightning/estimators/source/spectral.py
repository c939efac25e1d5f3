"""What a segment of training does along one eigenvector of curvature, as functions of its
eigenvalue."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Transfer:
    """What a segment does to the queries' adjoints along each eigenvector of curvature.

    An adjoint has one component for the parameters and, where single steps are followed, one for
    each state of the optimizer.

    Attributes:
        response: what the segment's gradients are multiplied by, for each component of the adjoint
            at its end: [component, *eigenvalues].
        carry: the adjoint at its start from the one at its end: [component at the start, component
            at the end, *eigenvalues].
    """

    response: Tensor
    carry: Tensor


def averaged_transfer(eigenvalues: Tensor, time: float) -> Transfer:
    """Gradient descent for so long, with the order of batches averaged out."""
    response, decay = segment_response(time)(eigenvalues), segment_decay(time)(eigenvalues)
    return Transfer(response[None], decay[None, None])


class LinearAdjoint:
    """The adjoint of an optimizer whose steps are linear in the gradients, backwards through its
    steps, by eigenvalue.

    It depends linearly on the adjoint at the segment's end and is stored as its coefficients
    (docs/methods.md, "SOURCE on the recorded order").
    """

    def __init__(self, eigenvalues: Tensor, rule: OptimizerRule) -> None:
        identity = torch.eye(1 + len(rule.states)).to(eigenvalues)[..., None, None, None]
        self._parameters, *states = (identity * torch.ones_like(eigenvalues)).unbind()
        self._states = dict(zip(rule.states, states, strict=True))
        self._eigenvalues, self._rule = eigenvalues, rule

    @property
    def coefficients(self) -> Tensor:
        """Coefficients so far: [component, component at the end, *eigenvalues]."""
        ended = torch.zeros_like(self._parameters)  # a state that began in the segment
        states = [self._states.get(name, ended) for name in self._rule.states]
        return torch.stack([self._parameters, *states])

    def step(self, step: ParameterStep, clipping: float) -> Tensor:
        """Go one step back.

        Args:
            step: without weight decay, which is part of the eigenvalues.
            clipping: what the step's gradient was multiplied by.

        Returns:
            The coefficients of u, [component at the end, *eigenvalues], with which the step's
            gradients enter: s[q, n] -= share(n) u . g_n.
        """
        assert self._rule.adjoint is not None
        u = clipping * self._rule.adjoint(self._parameters, self._states, step)
        self._parameters = self._parameters + self._eigenvalues * u
        return u


def stepwise_transfer(
    eigenvalues: Tensor, rule: OptimizerRule, steps: Iterable[tuple[ParameterStep, float]]
) -> Transfer:
    """One step of gradient descent after the other.

    Args:
        steps: each step with its clipping factor, the last one first.
    """
    adjoint = LinearAdjoint(eigenvalues, rule)
    response = torch.zeros_like(adjoint.coefficients[0])
    for step, clipping in steps:
        response -= adjoint.step(step, clipping)
    return Transfer(response, adjoint.coefficients)


def combined(coefficients: Tensor, adjoint: Tensor) -> Tensor:
    """Sum over the components of an adjoint, each times its coefficients: [component, *eigenvalues]
    and [component, query, *eigenvalues] -> [query, *eigenvalues]."""
    total = coefficients[0] * adjoint[0]
    for coefficient, component in zip(coefficients[1:], adjoint[1:], strict=True):
        total = total + coefficient * component
    return total
