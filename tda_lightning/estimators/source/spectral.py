"""What a segment of training does along one eigenvector of curvature, as functions of its
eigenvalue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass
class MomentumAdjoint:
    """The adjoint of SGD with momentum, backwards through its steps, by eigenvalue.

    The state is the pair (a, b) of docs/methods.md, "SOURCE on the recorded order": the adjoints of
    parameter and momentum buffer. It depends linearly on the pair at the segment's end, and is
    stored as its coefficients: ``a`` and ``b`` are each a pair of tensors, the factors of the a and
    of the b there.
    """

    eigenvalues: Tensor

    def __post_init__(self) -> None:
        one, zero = torch.ones_like(self.eigenvalues), torch.zeros_like(self.eigenvalues)
        self.a = (one, zero)
        self.b = (zero, one)

    def step(
        self,
        rate: float,
        momentum: float,
        dampening: float,
        nesterov: bool,
        clipping: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Go one step back.

        Args:
            clipping: what the step's gradient was multiplied by.

        Returns:
            The coefficients of u, with which the step's gradients enter:
            s[q, n] -= share(n) u . g_n.
        """
        kept = rate * momentum if nesterov else rate
        b = tuple(b - kept * a for a, b in zip(self.a, self.b, strict=True))
        u = tuple(
            clipping * ((1 - dampening) * b - (rate * a if nesterov else 0))
            for a, b in zip(self.a, b, strict=True)
        )
        self.a = tuple(a + self.eigenvalues * u for a, u in zip(self.a, u, strict=True))  # type: ignore[assignment]
        self.b = tuple(momentum * b for b in b)  # type: ignore[assignment]
        return u[0], u[1]
