r"""The penalty that a training step adds to the losses of its examples, and its curvature.

A penalty :math:`\sum_p \frac{c_p}{2} \|\theta_p\|^2` in the loss is what weight decay of
:math:`c_p` in the optimizer is: it belongs to no example, and its curvature :math:`c_p I` is part
of what the run minimised. Leaving it out is a mistake of published code (the gradient has the
regulariser, the Hessian has not).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_SIZE = 0.05  # of the changes of weights that tell the curvature, over their own size
_SMALLEST = 1e-2  # size of weights from which on they are told by their own


@dataclass(frozen=True)
class Penalty:
    """What a step adds that depends on no example.

    Attributes:
        strengths: c of each parameter that has one, by name.
        other: whether there is more than squared weights: its curvature is not known.
    """

    strengths: Mapping[str, float] = field(default_factory=dict)
    other: bool = False

    @property
    def notes(self) -> list[str]:
        """What a reader of the scores should know."""
        found = []
        if self.strengths:
            values = self.strengths.values()
            least, most = f"{min(values):.3g}", f"{max(values):.3g}"
            sizes = least if least == most else f"{least} to {most}"
            found.append(
                f"training_step adds a penalty on squared weights to its loss. In curvature it "
                f"counts as the weight decay that it is ({sizes})."
            )
        if self.other:
            found.append(
                "training_step adds a penalty (or the logarithm of a learned factor) to its loss "
                "that is no multiple of squared weights. It belongs to no example, and estimators "
                "that use curvature leave that of the penalty out. Exact unrolling has it."
            )
        return found


def penalty_of(module: nn.Module, rest: Callable[[], tuple[Tensor, Tensor]]) -> Penalty:
    """The penalty of a training step.

    Args:
        rest: gives the loss of a batch, and what is left of it without the parts of its examples.
    """
    with torch.enable_grad():
        total, left = rest()
        dtypes = (next(module.parameters()).dtype, total.dtype)
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        visible = float(left.detach().abs()) > 16 * eps * float(total.detach().abs())
        if not visible or not left.requires_grad:
            return Penalty()
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        own = torch.Generator().manual_seed(0)
        changes = {name: _change(p, own) for name, p in parameters.items()}
        first = _gradients(rest, parameters)
        with _moved(parameters, changes):
            second = _gradients(rest, parameters)
    scale = torch.stack([g.abs().max() for g, _ in first.values()]).max()
    if not bool(scale > 0):  # a constant
        return Penalty()
    strengths, other = {}, False
    for name, change in changes.items():
        (before, noise), (after, _) = first[name], second[name]
        difference = after - before
        strength = float((difference * change).sum() / change.square().sum())
        # What the losses of the examples leave, which cancel up to rounding.
        allowed = 1e-3 * difference.norm() + 64 * eps * noise * change.numel() ** 0.5
        if not bool((difference - strength * change).norm() <= allowed):
            other = True
        elif bool(difference.norm() > allowed):
            strengths[name] = strength
    return Penalty(strengths, other)


def _change(parameter: Tensor, own: torch.Generator) -> Tensor:
    size = max(float(parameter.detach().square().mean().sqrt()), _SMALLEST) * _SIZE
    drawn = torch.randn(parameter.shape, generator=own, dtype=torch.float64)
    return (size * drawn).to(parameter)


def _gradients(
    rest: Callable[[], tuple[Tensor, Tensor]], parameters: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, float]]:
    """Of the rest, with the largest entry of that of the whole loss, by parameter."""
    total, left = rest()
    whole, found = (
        torch.autograd.grad(
            value, list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        for value in (total, left)
    )
    return {
        name: (_dense(own), float(_dense(both).abs().max()))
        for name, own, both in zip(parameters, found, whole, strict=True)
    }


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


@contextmanager
def _moved(parameters: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters moved; at the end the very tensors of before."""
    before = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = p.data + changes[name]
        yield
    finally:
        for name, p in parameters.items():
            p.data = before[name]
