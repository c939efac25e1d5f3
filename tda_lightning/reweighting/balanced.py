r"""Weights under which features say nothing about the label, one feature at a time.

A word-label correlation is the difference between how often a label comes with a word and how often
it comes at all ("Stubborn lexical bias in data and models", Joshi, Serrano and Smith 2023,
2306.02190, sec. 3). Weights that even it out solve a convex problem:

.. math::
    \min_w\; \frac12 \sum_{f, c} \frac{\big(\sum_n w_n x_{nf} (y_{nc} - p_c)\big)^2}{\sum_n x_{nf}}
    + \frac\lambda2 \sum_n (w_n - 1)^2
    \quad\text{with}\quad 0 \le w_n \le b,\; \sum_n w_n = N

where :math:`x_{nf}` says whether example n has feature f, :math:`y_{nc}` whether it has label c,
and :math:`p_c` is the share of label c, which is kept by a feature that all examples have. The
penalty :math:`\lambda` is ours: without it many weights are equally good.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.reweighting.projection import check_weights, project

_ITERATIONS = 3000
_POWER_STEPS = 100


@dataclass(frozen=True)
class Balance:
    """Weights that even features out, and how well.

    Attributes:
        weights: float64 [train].
        before, after: difference between the label's share among examples with the feature and its
            share in all, at weights 1 and at these, float64 [feature, class].
        iterations: of the solver.
        gap: largest move of a weight by one more step of the solver; near 0 at the optimum.
    """

    weights: Tensor
    before: Tensor
    after: Tensor
    iterations: int
    gap: float


def balanced_weights(
    features: Tensor,
    labels: Tensor,
    bound: float = 4.0,
    penalty: float = 0.01,
    tolerance: float = 1e-9,
) -> Balance:
    """Weights under which no single feature says anything about the label, as far as ``bound`` and
    ``penalty`` allow.

    Args:
        features: whether an example has a feature, [train, feature]; numbers of at least 0.
        labels: class numbers, int64 [train].
        bound: the largest weight.
        penalty: lambda, above 0: how much weights are kept near 1.
        tolerance: end when no weight moves by more.

    Raises:
        ValueError: impossible settings or shapes, a feature that no example has, or one class.
    """
    x, y = _checked(features, labels)
    if not 0 < penalty < float("inf"):
        raise ValueError(f"penalty must be a number above 0, got {penalty}.")
    operator = _Imbalance(x, y)
    # FISTA (Beck & Teboulle 2009) with the exact projection.
    rate = 1 / (operator.largest_eigenvalue() * 1.02 + penalty)
    start = project(torch.ones(len(x), dtype=torch.float64), bound)
    weights = ahead = start
    momentum, done, gap = 1.0, 0, float("inf")
    while done < _ITERATIONS and gap > tolerance:
        done += 1
        gradient = operator.gradient(ahead) + penalty * (ahead - 1)
        following = project(ahead - rate * gradient, bound)
        gap = float((following - ahead).abs().max())
        # Restarted where it goes uphill (O'Donoghue & Candes 2015).
        if float((ahead - following) @ (following - weights)) > 0:
            momentum = 1.0
        longer = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / longer * (following - weights)
        weights, momentum = following, longer
    ones = torch.ones_like(weights)
    return Balance(weights, imbalance(x, y, ones), imbalance(x, y, weights), done, gap)


def imbalance(features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """How much more often each label comes with a feature than it does at all, float64
    [feature, class]; NaN for a feature without weight."""
    x, y = _checked(features, labels)
    own = check_weights(weights, len(x))
    weighted = own[:, None] * _one_hot(y)
    shares = (x.T @ weighted) / (x.T @ own)[:, None]
    return shares - weighted.sum(0) / own.sum()


class _Imbalance:
    """The quadratic form of the objective, [train] x [train], by products alone."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        everyone = torch.ones(len(x), 1, dtype=torch.float64)
        self._x = torch.cat([x, everyone], dim=1)  # the last one keeps the shares of the labels
        one_hot = _one_hot(y)
        self._centred = one_hot - one_hot.mean(0)
        self._scale = 1 / self._x.sum(0)

    def gradient(self, weights: Tensor) -> Tensor:
        """Of half the sum of squares, [train]."""
        found = self._x.T @ (weights[:, None] * self._centred)
        return ((self._x @ (found * self._scale[:, None])) * self._centred).sum(1)

    def largest_eigenvalue(self) -> float:
        """By power iteration."""
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(len(self._x), dtype=torch.float64, generator=generator)
        size = 1.0
        for _ in range(_POWER_STEPS):
            vector = self.gradient(vector / vector.norm())
            size = float(vector.norm())
            if size == 0:
                return 0.0
        return size


def _one_hot(labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels).double()


def _checked(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if features.dim() != 2 or labels.shape != features.shape[:1] or not features.numel():
        raise ValueError(
            "Expected features [train, feature] and one label for each training example, got "
            f"{list(features.shape)} and {list(labels.shape)}."
        )
    if labels.is_floating_point() or bool((labels < 0).any()):
        raise ValueError("Expected class numbers from 0 as labels.")
    x, y = features.double(), labels.long()
    if len(y.unique()) < 2:
        raise ValueError("All training examples have one label: nothing can be told by a feature.")
    if bool((x < 0).any()) or not bool(x.isfinite().all()):
        raise ValueError("Expected features of at least 0: whether or how often an example has it.")
    if bool((x.sum(0) == 0).any()):
        first = int((x.sum(0) == 0).nonzero()[0])
        raise ValueError(f"No training example has feature {first}. Leave it out.")
    return x, y
