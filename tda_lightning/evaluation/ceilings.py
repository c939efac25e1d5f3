r"""How well can retraining be predicted at all, when it also depends on the seed?

The linear datamodeling score of the best possible predictor, for scores to be read against. What
additive scores can reach is :mod:`tda_lightning.evaluation.additive`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tda_lightning.evaluation.linear_datamodeling import (
    Interval,
    NothingToRankError,
    rank_correlation,
)

_SPLITS = 10  # random halves of the seeds, averaged
_SPLITS_OF_A_RESAMPLE = 2

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ceiling:
    """A linear datamodeling score that no scores are needed for.

    Attributes:
        over_queries: with its interval over queries.
        over_subsets: with its interval over subsets.
    """

    over_queries: Interval
    over_subsets: Interval


def seed_ceiling(
    outcomes: Tensor, confidence: float = 0.95, resamples: int = 200, seed: int = 0
) -> Ceiling:
    r"""The score of a predictor that knows each subset's mean over all seeds.

    The measurement of a query after training on subset :math:`m` with seed :math:`r` is
    :math:`y_{mr} = \mu_m + \epsilon_{mr}`, with noise that is independent from seed to seed. Scores
    are judged by the mean over R seeds, :math:`t_m`. Nothing that is known before training
    predicts more than :math:`\mu_m`, and its correlation with the target is the root of the
    target's *reliability*:

    .. math::
        \mathrm{corr}(\mu, t)^2 = \rho_R
        = \frac{\mathrm{var}(\mu)}{\mathrm{var}(\mu) + \mathrm{var}(\epsilon) / R}.

    The means over two halves of the seeds, h each, share :math:`\mu` alone, so their correlation is
    :math:`\rho_h`, and Spearman and Brown's formula gives that of all seeds:

    .. math::
        \rho_R = \frac{k \rho_h}{1 + (k - 1) \rho_h}, \qquad k = R / h.

    How it is computed:

    - The halves are drawn anew for every subset, several times, and their correlations are
      averaged: seeds of different subsets have nothing in common. An odd seed is left out of the
      halves.
    - Correlations are Spearman's, as the score is. Moran's formula turns the expected rank
      correlation of a normal sample of this size into Pearson's, and back at the end.
    - The root of a noisy reliability is too small on average, and negative ones have none. So the
      queries' reliabilities are moved towards their mean until their variance is what is left
      after that of estimating them, before roots are taken.
    - Intervals are by the bootstrap, over queries or over subsets. Resampled subsets repeat, which
      lowers their rank correlations. So the mean reliability of a resample is taken relative to
      their median, and moves those of all queries.

    Args:
        outcomes: measurements, [subset, seed, query], of at least 2 seeds and 4 subsets.
        confidence: of the intervals.
        resamples: bootstrap samples.
        seed: of halves and resamples.

    Raises:
        ValueError: one seed tells nothing about the noise between seeds.
        NothingToRankError: the mean over seeds is constant for every query.

    References:
        | Correlation calculated from faulty data (Spearman, 1910), British Journal of Psychology 3
        | Some experimental results in the correlation of mental abilities (Brown, 1910), ibid.
        | Rank correlation and product-moment correlation (Moran, 1948), Biometrika 35
    """
    values = outcomes.double().cpu().numpy()
    subsets, seeds = values.shape[:2]
    if seeds < 2 or subsets < 4:
        raise ValueError(
            "How much seeds decide is told by at least 2 seeds of at least 4 subsets, got "
            f"{seeds} and {subsets}."
        )
    means = values.mean(1)
    known = (means != means[0]).any(0)
    if not known.any():
        raise NothingToRankError("The outcomes of every query are constant: nothing to rank.")
    values = values[:, :, known]
    generator = np.random.default_rng(seed)
    longer = seeds / (seeds // 2)
    found = _reliability_of_half(values, _SPLITS, generator)
    resampled = np.stack(
        [
            _reliability_of_half(
                values[generator.integers(subsets, size=subsets)], _SPLITS_OF_A_RESAMPLE, generator
            )
            for _ in range(resamples)
        ]
    )

    def correlation(reliability: Array) -> Array:
        return np.sqrt(longer * reliability / (1 + (longer - 1) * reliability))

    return ceiling(found, resampled, known, correlation, subsets, confidence, generator)


def ceiling(
    found: Array,
    resampled: Array,
    known: NDArray[np.bool_],
    correlation: Callable[[Array], Array],
    subsets: int,
    confidence: float,
    generator: np.random.Generator,
) -> Ceiling:
    """A ceiling from noisy estimates for every query.

    Args:
        found: shares of variance, between 0 and 1 but for their noise, [known query].
        resampled: the same from resampled subsets, [resample, known query].
        known: which queries they are of, bool [query].
        correlation: Pearson's, given such shares.
        subsets: their number, which the expected rank correlation depends on.
        confidence: of the intervals.
        generator: of the resampled queries.
    """
    # Noise that queries share moves their mean, and is no part of how they differ.
    apart = resampled - resampled.mean(1, keepdims=True)
    noise = float(apart.var(0, ddof=1).mean())

    def score(shares: Array, variance: float) -> Array:
        """Of each query, given the variance with which the shares were estimated."""
        return rank_from_pearson(correlation(_narrowed(shares, variance).clip(0, 1)), subsets)

    per_query = np.full(len(known), np.nan)
    per_query[known] = score(found, noise)
    value = float(np.nanmean(per_query))
    # Resampled subsets repeat, which lowers rank correlations: only their spread is used.
    means = resampled.mean(1)
    over_subsets = np.array(
        [score(found + part, noise).mean() for part in means - np.median(means)]
    )
    draws = generator.integers(len(found), size=(len(resampled), len(found)))
    over_queries = np.array([score(found[draw], noise).mean() for draw in draws])
    levels = [(1 - confidence) / 2, (1 + confidence) / 2]

    def interval(samples: Array) -> Interval:
        low, high = np.quantile(samples, levels)
        return Interval(value, float(low), float(high), torch.from_numpy(per_query))

    return Ceiling(interval(over_queries), interval(over_subsets))


def _reliability_of_half(values: Array, splits: int, generator: np.random.Generator) -> Array:
    """Pearson's correlation of the means over two random halves of the seeds, [query]."""
    subsets, seeds, queries = values.shape
    half = seeds // 2
    total = np.zeros(queries)
    for _ in range(splits):
        order = generator.random((subsets, seeds)).argsort(1)
        drawn = np.take_along_axis(values, order[:, :, None], 1)
        first, second = drawn[:, :half].mean(1), drawn[:, half : 2 * half].mean(1)
        pair = (torch.from_numpy(part.T.copy()) for part in (first, second))
        total += np.nan_to_num(rank_correlation(*pair).numpy())
    return pearson_from_rank(total / splits, subsets)


def _narrowed(values: Array, variance: float) -> Array:
    """``values`` moved towards their mean, so that their variance is without ``variance``."""
    mean = values.mean()
    spread = values.var(ddof=1) if len(values) > 1 else 0.0
    share = np.sqrt(max(0.0, spread - variance) / spread) if spread > 0 else 0.0
    return np.asarray(mean + share * (values - mean))


def rank_from_pearson(correlation: Array, count: int) -> Array:
    """Expected rank correlation of ``count`` normal pairs (Moran 1948)."""
    outer, inner = np.arcsin(correlation), np.arcsin(correlation / 2)
    expected = 6 / np.pi * (outer + (count - 2) * inner) / (count + 1)
    return np.asarray(expected.clip(-1, 1))  # rounding


def pearson_from_rank(correlation: Array, count: int) -> Array:
    """The inverse of :func:`rank_from_pearson`."""
    grid = np.sin(np.linspace(-np.pi / 2, np.pi / 2, 2001))  # dense where it is steep
    return np.asarray(np.interp(correlation, rank_from_pearson(grid, count), grid))
