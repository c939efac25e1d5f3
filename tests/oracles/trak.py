"""TRAK with dense gradients, an explicit projection matrix and the paper's formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.oracles.gradients import Batch, flatten, per_example_gradients


def output(kind: str, module: nn.Module, batch: Batch) -> Tensor:
    """The number that an example's loss is a function of, [batch]: the log-odds of the geometric
    mean of its labels' probabilities, or the root of twice its mean squared error."""
    outputs, targets = module(batch[0]), batch[1]
    if kind == "regression":
        return (2 * (outputs - targets).square().reshape(len(outputs), -1).mean(1)).sqrt()
    each = outputs.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    probability = each.reshape(len(outputs), -1).mean(1).exp()
    return (probability / (1 - probability)).log()


def slope(kind: str, output: Tensor) -> Tensor:
    """The derivative of the loss by that number: log(1 + e^-f) or f^2 / 2."""
    return output if kind == "regression" else -1 / (1 + output.exp())


@dataclass(frozen=True)
class Features:
    """Dense gradients of the output [batch, parameters], and the loss's derivative [batch]."""

    gradients: Tensor
    slopes: Tensor


def features(kind: str, module: nn.Module, data: Batch, names: Sequence[str]) -> Features:
    gradients = per_example_gradients(module, lambda m, b: output(kind, m, b), data, names)
    with torch.no_grad():
        slopes = slope(kind, output(kind, module, data))
    return Features(flatten(gradients, names), slopes)


def trak(
    train: Sequence[Features],
    query: Sequence[Features],
    projections: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    uses: Sequence[Tensor] | None = None,
    damping: float = 0.0,
) -> Tensor:
    r"""Scores [query, train] of an ensemble, in the unit of the loss.

    .. math::
        \Big(\frac1M \sum_m L'_m(q)\Big) \Big(\frac1M \sum_m L'_m(n)\Big)
        \frac1M \sum_m \phi_m(q)^\top (\Phi_m^\top \Phi_m)^{-1} \phi_m(n)

    Args:
        train: of each member; ``query`` likewise.
        projections: of each member, [parameters, dimension].
        weights: of each member, what a training example counts by in the moments, [train]; None: 1.
        uses: what it counts by itself; None: 1.
        damping: a multiple of the mean eigenvalue.
    """
    kernel, count = 0, len(train)
    ones = [torch.ones_like(own.slopes) for own in train]
    weights, uses = weights or ones, uses or ones
    for number, (own, asked, matrix) in enumerate(zip(train, query, projections, strict=True)):
        projected = own.gradients @ matrix
        moments = projected.T @ torch.diag(weights[number]) @ projected
        moments = moments + damping * moments.diagonal().mean() * torch.eye(len(moments)).double()
        solved = torch.linalg.solve(moments, projected.T) * uses[number]
        kernel = kernel + asked.gradients @ matrix @ solved / count
    train_slopes = torch.stack([own.slopes for own in train]).mean(0)
    query_slopes = torch.stack([own.slopes for own in query]).mean(0)
    return query_slopes[:, None] * kernel * train_slopes
