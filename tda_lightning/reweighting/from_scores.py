"""Weights of training examples from their scores for a target, and what they will change."""

from __future__ import annotations

from torch import Tensor

from tda_lightning.reweighting.projection import check_weights, project


def weights_from_scores(scores: Tensor, rate: float = 1.0, bound: float = 4.0) -> Tensor:
    r"""A bounded step from equal weights towards the examples that help a target.

    .. math::
        w = \Pi\Big(1 + \rho\, \frac{\bar s - \mathrm{mean}(\bar s)}{\mathrm{std}(\bar s)}\Big)

    with :math:`\bar s` the mean of the scores over the target and :math:`\Pi` the projection on
    :math:`0 \le w_n \le b, \sum_n w_n = N` (:func:`~tda_lightning.reweighting.project`). Of all
    weights as far from 1, these have the largest predicted gain while no bound is met.

    Args:
        scores: [query, train], as in ``Scores.values``: positive for an example that helped.
        rate: :math:`\rho`: how much weight an example gains whose score is one standard deviation
            above the mean. Negative: away from what helps.
        bound: b, the largest weight.

    Returns:
        float64 [train].

    Raises:
        ValueError: scores that are not finite or all equal, or an impossible setting.

    Example:
        >>> import torch
        >>> weights_from_scores(torch.tensor([[1.0, -1.0, 1.0, -1.0]]), rate=0.5)
        tensor([1.5000, 0.5000, 1.5000, 0.5000], dtype=torch.float64)
    """
    if scores.dim() != 2 or not scores.numel():
        raise ValueError(f"Expected scores [query, train], got the shape {list(scores.shape)}.")
    if not abs(rate) < float("inf"):
        raise ValueError(f"rate must be a number, got {rate}.")
    mean = scores.double().mean(0)
    if not bool(mean.isfinite().all()):
        first = int((~mean.isfinite()).nonzero()[0])
        raise ValueError(
            f"Training example {first} has no finite score for every query, so it cannot be "
            "weighted. Scores of FastIF are of some examples only: use InfluenceFunction."
        )
    spread = mean.std(unbiased=False)
    if not float(spread) > 0:
        raise ValueError("All training examples have the same score: there is nothing to weight.")
    return project(1 + rate * (mean - mean.mean()) / spread, bound)


def predicted_change(scores: Tensor, weights: Tensor) -> Tensor:
    r"""To first order, what training with these weights changes in each query's measurement,
    float64 [query].

    .. math::
        \Delta m_q \approx - \sum_n (w_n - 1)\, s_{qn}

    A removal is :math:`w_n = 0`, and its change is the score.

    Raises:
        ValueError: impossible weights.
    """
    own = check_weights(weights, scores.shape[1])
    return -(scores.double() @ (own - 1))
