"""The linear datamodeling score (LDS): how well do scores predict retraining?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from tda_lightning.records.scores import Scores

_RANKED_AT_ONCE = 1 << 20  # numbers, of resamples


class NothingToRankError(ValueError):
    """A correlation with something constant, which is undefined rather than 0."""


@dataclass(frozen=True)
class Interval:
    """A mean over queries with a bootstrap interval.

    The interval is over queries only; other subsets, or another training run, would vary too.

    Attributes:
        value: mean of ``per_query``, NaN left out.
        low: lower end of the interval.
        high: upper end.
        per_query: float64 [query]; NaN where the truth is constant.
    """

    value: float
    low: float
    high: float
    per_query: Tensor

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def draw_subsets(num_train: int, fraction: float, count: int, seed: int = 0) -> Tensor:
    """Random subsets of round(fraction x num_train) kept examples: bool [subset, train].

    Example:
        >>> draw_subsets(num_train=20, fraction=0.95, count=3).sum(1)
        tensor([19, 19, 19])
    """
    size = round(fraction * num_train)
    if not 0 < size < num_train:
        raise ValueError(
            f"A fraction of {fraction} keeps {size} of {num_train} examples; expected a fraction "
            "that keeps some and leaves some out."
        )
    generator = torch.Generator().manual_seed(seed)
    subsets = torch.zeros(count, num_train, dtype=torch.bool)
    for row in subsets:
        row[torch.randperm(num_train, generator=generator)[:size]] = True
    return subsets


def linear_datamodeling_score(
    scores: Scores | Tensor,
    subsets: Tensor,
    outcomes: Tensor,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    r"""How well sums of scores rank the models retrained on subsets.

    .. math::
        LDS = \frac1Q \sum_q \rho\Big(\sum_{n \in S_m} s_{qn},\; -m_q(S_m)\Big)_{m = 1 \dots M}

    with :math:`\rho` Spearman's rank correlation over the subsets. The minus is there because the
    presence of a proponent lowers the measurement.

    Args:
        scores: [query, train].
        subsets: which examples each subset keeps, bool [subset, train].
        outcomes: measurements after retraining, [subset, query], or [subset, seed, query] to be
            averaged over seeds.
        confidence: of the bootstrap interval over queries.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ValueError: shapes do not match, or examples have no score.

    References:
        | TRAK: Attributing Model Behavior at Scale (Park et al., 2023), Definition 2.3
        | https://arxiv.org/abs/2303.14186

    Example:
        >>> scores = torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, -1.0]])
        >>> subsets = draw_subsets(num_train=3, fraction=0.67, count=8)
        >>> str(linear_datamodeling_score(scores, subsets, -subsets.float() @ scores.T))
        '1.000 [1.000, 1.000]'
    """
    predicted, truth = _compared(scores, subsets, outcomes)
    return bootstrap(rank_correlation(predicted, truth), confidence, resamples, seed)


def interval_over_subsets(
    scores: Scores | Tensor,
    subsets: Tensor,
    outcomes: Tensor,
    confidence: float = 0.95,
    resamples: int = 400,
    seed: int = 0,
) -> Interval:
    """:func:`linear_datamodeling_score` with the interval over subsets: same queries, other draws.

    With few subsets it is wide whatever the number of queries, because they share the subsets. A
    resample in which the measurements of every query are constant is left out.
    """
    predicted, truth = _compared(scores, subsets, outcomes)
    return resample_subsets(predicted, truth, confidence, resamples, seed)


def resample_subsets(
    predicted: Tensor,
    truth: Tensor,
    confidence: float = 0.95,
    resamples: int = 400,
    seed: int = 0,
) -> Interval:
    """Spearman's correlation of predictions with the truth, both [query, subset], averaged over
    queries, with the bootstrap interval over subsets."""
    count = truth.shape[1]
    whole = bootstrap(rank_correlation(predicted, truth), confidence, 1, seed)
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    means: list[float] = []
    # Ranking many short rows at once takes little longer than ranking a few.
    for some in np.array_split(draws, 1 + predicted.numel() * resamples // _RANKED_AT_ONCE):
        per_query = rank_correlation(*(part[:, some].flatten(0, 1) for part in (predicted, truth)))
        averages = per_query.view(len(predicted), len(some)).nanmean(0)
        means += averages[~averages.isnan()].tolist()
    if not means:
        return Interval(whole.value, np.nan, np.nan, whole.per_query)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(whole.value, float(low), float(high), whole.per_query)


def _compared(scores: Scores | Tensor, subsets: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the scores kept, and minus the measurements, both [query, subset]."""
    values = complete(scores)
    if outcomes.dim() == 3:
        outcomes = outcomes.double().mean(1)
    queries, train = values.shape
    if subsets.dtype != torch.bool or subsets.dim() != 2 or subsets.shape[1] != train:
        raise ValueError(
            f"subsets must be bool [subset, {train}], True for the examples kept, got "
            f"{subsets.dtype} of shape {list(subsets.shape)}."
        )
    if outcomes.shape != (len(subsets), queries):
        raise ValueError(
            f"outcomes must have the shape [{len(subsets)} subsets, {queries} queries], got "
            f"{list(outcomes.shape)}."
        )
    if len(subsets) < 3:
        raise ValueError(f"A rank correlation needs at least 3 subsets, got {len(subsets)}.")
    if not bool(outcomes.isfinite().all()):
        raise ValueError(
            "Some outcomes are not finite: a retraining diverged or is missing. Leave out its "
            "subset."
        )
    predicted = (subsets.double() @ values.double().cpu().T).T
    return predicted, -outcomes.double().cpu().T


def complete(scores: Scores | Tensor) -> Tensor:
    """The scores [query, train], none of them missing.

    Raises:
        ValueError: some examples have no score (``Scores.candidates``).
    """
    values = scores.values if isinstance(scores, Scores) else scores
    missing = sum(int(row.isnan().sum()) for row in values)  # by rows: the file may be large
    if missing:
        raise ValueError(
            f"{missing} of {values.numel()} scores are missing (NaN): only candidates were scored. "
            "Expected scores of every training example, from InfluenceFunction for example."
        )
    return values


def difference(first: Interval, second: Interval, seed: int = 0) -> Interval:
    """``first`` minus ``second``, query by query, with the interval that tells estimators apart.

    Both were judged on the same queries and subsets, so their own intervals overlap too much.
    """
    return bootstrap(first.per_query - second.per_query, seed=seed)


def rank_correlation(predicted: Tensor, truth: Tensor) -> Tensor:
    """Spearman's correlation of each row, [row].

    0 where the prediction is constant, NaN where the truth is.
    """
    a, b = (_centred_ranks(part.numpy()) for part in (predicted, truth))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.where((a == 0).all(1), 0.0, (a * b).sum(1) / size)
    return torch.from_numpy(np.where((b == 0).all(1), np.nan, correlation))


def bootstrap(
    per_query: Tensor, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean with its percentile bootstrap interval (Efron 1979)."""
    known = per_query.double()
    kept = known[~known.isnan()].numpy()
    if not len(kept):
        raise NothingToRankError(
            "The outcomes of every query are constant: there is nothing to rank."
        )
    draws = np.random.default_rng(seed).integers(len(kept), size=(resamples, len(kept)))
    low, high = np.quantile(kept[draws].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(kept.mean()), float(low), float(high), known)


def _centred_ranks(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    ranks = rankdata(rows, axis=1)
    return np.asarray(ranks - ranks.mean(axis=1, keepdims=True))
