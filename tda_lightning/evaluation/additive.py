"""How well can additive scores predict retraining?

Scores are added up over the examples that a subset keeps, so they predict as a linear model of the
data weights does, and no better than the best one. Two numbers say how good that is:

- :func:`additive_ceiling` estimates it. The estimate is unbiased from few retrainings, with an
  interval that tells when they are too few.
- :func:`fitted_linear_model` is a lower limit: what a linear model that was fitted to some of the
  retrainings achieves on the others.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import norm, rankdata
from torch import Tensor

from tda_lightning.evaluation.ceilings import Array, Ceiling, ceiling
from tda_lightning.evaluation.linear_datamodeling import (
    NothingToRankError,
    bootstrap,
    rank_correlation,
    resample_subsets,
)

_FOLDS = 10


def additive_ceiling(
    subsets: Tensor,
    outcomes: Tensor,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> Ceiling | None:
    r"""The score of the best linear model of the data weights, estimated.

    Let w be the centred weights of a random subset and y the measurement after training on it, as
    the normal score of its rank: the score that this is a limit of sees nothing but ranks. The best
    linear predictor of y has the coefficients :math:`\Sigma^+ b` with :math:`b = E[w y]` and
    :math:`\Sigma = E[w w^T]`. For subsets of a share :math:`\alpha` of N examples
    :math:`\Sigma = c (I - 11^T / N)`, with :math:`c = \alpha (1 - \alpha) N / (N - 1)`, so the
    share of the variance of y that it explains is

    .. math::
        R^2 = \frac{|b|^2}{c\, \mathrm{var}(y)}, \qquad
        |b|^2 = E[y\, y'\, w \cdot w'],

    where primes denote a second, independent subset. The mean over all pairs of different subsets
    estimates the last expectation without bias, whatever the measurement depends on and however few
    subsets there are; no model is fitted. (It is the estimator of Haseman and Elston, by which
    genetics tells heritability.) Its standard error for one query is about :math:`\sqrt{2N} / M`
    with M subsets.

    What is not additive up to a monotone function of the measurement counts as unexplained, and so
    does the noise between seeds. Roots, the step to a rank correlation and both intervals are those
    of :func:`~tda_lightning.evaluation.seed_ceiling`; a resampled subset forms no pair with itself.

    Args:
        subsets: which examples each keeps, bool [subset, train], drawn independently, all of one
            size.
        outcomes: measurements, [subset, seed, query], averaged over seeds.
        confidence: of the intervals.
        resamples: bootstrap samples.
        seed: of the resamples.

    Returns:
        None for fewer than 4 subsets, and where each leaves out a single example: every measurement
        is then additive.

    Raises:
        NothingToRankError: the measurements of every query are constant.

    References:
        | The investigation of linkage between a quantitative trait and a marker locus (Haseman and
        | Elston, 1972), Behavior Genetics 2
    """
    count, train = subsets.shape
    kept = int(subsets[0].sum())
    if count < 4 or train - kept < 2:
        return None
    share = kept / train
    weights = subsets.double().cpu().numpy() - share
    measured = outcomes.double().mean(1).cpu().numpy()
    known = (measured != measured[0]).any(0)
    if not known.any():
        raise NothingToRankError("The outcomes of every query are constant: nothing to rank.")
    measured = _normal_scores(measured[:, known])
    pairs = weights @ weights.T / (share * (1 - share) * train / (train - 1))
    np.fill_diagonal(pairs, 0)

    def explained(times: Array) -> Array:
        """Share of the variance, [query], where each subset counts so many times."""
        centred = measured - np.average(measured, axis=0, weights=times)
        weighted = times[:, None] * centred
        variance = (weighted * centred).sum(0) / (count - 1)
        different = max(1.0, count**2 - (times**2).sum())
        product = (weighted * (pairs @ weighted)).sum(0) / different
        # Both factors are measured from a mean that they are part of.
        whole = variance * ((1 - 1 / count) ** 2 + 1 / count**2)
        return np.divide(product, whole, out=np.zeros_like(whole), where=whole > 0)

    generator = np.random.default_rng(seed)
    draws = generator.integers(count, size=(resamples, count))
    times = [np.bincount(draw, minlength=count).astype(float) for draw in draws]
    resampled = np.stack([explained(row) for row in times])
    return ceiling(
        explained(np.ones(count)), resampled, known, np.sqrt, count, confidence, generator
    )


def fitted_linear_model(subsets: Tensor, outcomes: Tensor) -> Ceiling | None:
    r"""The score of a linear model of the data weights, fitted to the other retrainings.

    Ten folds of the subsets: for each, a ridge regression of the measurements on which examples
    are kept is fitted to the other nine, and predicts this one. Its ridge is the one of least
    leave-one-out error among those nine, the same for all queries. Measurements are the normal
    scores of their ranks among those nine. Weights are centred on the share
    that is kept, not on the mean of a fold, which is correlated negatively with what is left out.

    The best additive scores do at least as well, up to the intervals. The fit learns little from
    few retrainings, so the number is computed only where the design allows one of at least 0.5:
    a projection on the fitted subsets would reach

    .. math::
        \sqrt{\overline{|P w|^2 / |w|^2}}

    with a perfectly additive measurement without noise, where w are the centred weights of a subset
    and P projects on those of the other nine folds. That takes about a quarter as many subsets as
    there are training examples.

    Args:
        subsets: which examples each keeps, bool [subset, train].
        outcomes: measurements, [subset, seed, query], averaged over seeds.

    Returns:
        None where the subsets are too few for their number of examples, and where each leaves out a
        single example.

    Raises:
        NothingToRankError: the measurements of every query are constant.

    References:
        | Datamodels (Ilyas et al., 2022), which fits such models to far more retrainings
        | https://arxiv.org/abs/2202.00622
    """
    weights = subsets.double().cpu()
    weights = weights - weights.mean(1, keepdim=True)
    measured = outcomes.double().mean(1).cpu()
    count, train = subsets.shape
    if count < _FOLDS or train - int(subsets[0].sum()) < 2:
        return None
    folds = torch.arange(count) % _FOLDS  # subsets are drawn independently, in no order
    kernel = weights @ weights.T
    if _reach(kernel, folds) < 0.5:
        return None
    predicted = torch.empty_like(measured)
    for fold in range(_FOLDS):
        held = folds == fold
        part = kernel[~held]
        fitted = torch.from_numpy(_normal_scores(measured[~held].numpy()))
        coefficients = _ridge(part[:, ~held], fitted)
        predicted[held] = part[:, held].T @ coefficients
    pair = (predicted.T, measured.T)
    return Ceiling(bootstrap(rank_correlation(*pair)), resample_subsets(*pair))


def _normal_scores(values: Array) -> Array:
    """The normal quantiles of ranks within each column, [subset, query] (van der Waerden 1952)."""
    return np.asarray(norm.ppf(rankdata(values, axis=0) / (len(values) + 1)))


def _reach(kernel: Tensor, folds: Tensor) -> float:
    """The correlation that a noiseless additive measurement would allow."""
    shares = []
    for fold in range(_FOLDS):
        held = folds == fold
        inverse = torch.linalg.pinv(kernel[~held][:, ~held], hermitian=True)
        across = kernel[~held][:, held]
        shares.append((across * (inverse @ across)).sum(0) / kernel.diagonal()[held])
    return float(torch.cat(shares).mean().clamp_min(0).sqrt())


def _ridge(kernel: Tensor, measured: Tensor) -> Tensor:
    """Dual coefficients [subset, query] of the ridge of least leave-one-out error."""
    values, vectors = torch.linalg.eigh(kernel)
    values = values.clamp_min(0)
    centred = measured - measured.mean(0)
    rotated = vectors.T @ centred
    scale = centred.square().mean(0)
    used = scale > 0  # others are constant
    best, least = torch.zeros_like(centred), float("inf")
    for factor in np.logspace(-3, 3, 13):
        shrunk = 1 / (values + factor * values.mean())
        # The residual of leaving one out is that of the fit, by what the fit leaves of itself.
        dual = vectors @ (shrunk[:, None] * rotated)
        left = (vectors.square() * shrunk).sum(1)
        error = float(((dual / left[:, None]).square().mean(0)[used] / scale[used]).sum())
        if error < least:
            best, least = dual, error
    return best
