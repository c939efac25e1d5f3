r"""What the scores of an ensemble's runs say about an example: one number, large where it matters.

The measurement :math:`m_k` of run k would be :math:`m_k + s_{kn}` without example n, so the
distribution of the measurement over runs would have another mean, another variance, and lie at a
Wasserstein distance from what it is ("Distributional Training Data Attribution", Mlodozeniec et
al., 2025, https://arxiv.org/abs/2506.12965).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor | None], Tensor]


def mean(scores: Tensor, losses: Tensor | None) -> Tensor:
    """Change of the mean, [query, train]: what ``Scores.values`` of an ensemble is.

    Args:
        scores: [member, query, train].
        losses: measurements of the recorded runs, [member, query].
    """
    return scores.mean(0)


def stable(scores: Tensor, losses: Tensor | None) -> Tensor:
    """The mean over the standard deviation between runs."""
    return scores.mean(0) / scores.std(0).clamp(min=1e-30)


def spread(scores: Tensor, losses: Tensor | None) -> Tensor:
    """The standard deviation between runs."""
    return scores.std(0)


def variance(scores: Tensor, losses: Tensor | None) -> Tensor:
    r"""Change of the measurement's variance over runs,
    :math:`\mathrm{Var}_k(m_k + s_{kn}) - \mathrm{Var}_k(m_k)`; without ``losses`` that of the
    scores alone."""
    if losses is None:
        return scores.var(0)
    moved = losses[:, :, None] + scores
    return moved.var(0) - losses.var(0)[:, None]


def wasserstein(scores: Tensor, losses: Tensor | None) -> Tensor:
    """2-Wasserstein distance of the measurement's distribution over runs from the one without the
    example, with the sign of the mean change; without ``losses`` from 0."""
    if losses is None:
        return scores.square().mean(0).sqrt()
    moved = (losses[:, :, None] + scores).sort(0).values
    before = losses.sort(0).values[:, :, None]
    return (moved - before).square().mean(0).sqrt() * torch.sign(scores.mean(0))


MEASURES: Mapping[str, Measure] = {
    "mean": mean,
    "mean / standard deviation": stable,
    "standard deviation": spread,
    "variance": variance,
    "Wasserstein": wasserstein,
}
