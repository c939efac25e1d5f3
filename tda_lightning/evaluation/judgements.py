"""Scores judged by flipped labels, by other scores, and by the removal of examples and groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

from tda_lightning.evaluation.linear_datamodeling import (
    Interval,
    NothingToRankError,
    bootstrap,
    complete,
    rank_correlation,
)
from tda_lightning.records.scores import Scores


def detection_auc(self_influence: Scores | Tensor, wrong: Tensor) -> float:
    """Area under the ROC curve of finding ``wrong`` examples by large self-influence.

    The probability that a wrong example is ranked above a correct one, with ties counting half
    (Mann & Whitney 1947). A mislabelled example is learned from itself alone, so its own removal
    costs most.

    Args:
        self_influence: [train], or scores that hold it.
        wrong: bool [train].

    Example:
        >>> detection_auc(torch.tensor([0.1, 0.9, 0.3]), torch.tensor([False, True, False]))
        1.0
    """
    values, count = _checked(self_influence, wrong)
    ranks = torch.from_numpy(rankdata(values.numpy()))
    above = float(ranks[wrong].sum()) - count * (count + 1) / 2
    return above / (count * (len(wrong) - count))


def found_within(self_influence: Scores | Tensor, wrong: Tensor, fraction: float) -> float:
    """Share of the ``wrong`` examples in the first ``fraction`` of the ranking by self-influence.

    Examples tied with the last one in that part count in proportion.

    Args:
        self_influence: [train], or scores that hold it.
        wrong: bool [train].
        fraction: of the training set, above 0 and up to 1; rounded to whole examples, at least 1.

    Example:
        >>> wrong = torch.tensor([True, True, False, False])
        >>> found_within(torch.tensor([0.1, 0.9, 0.3, 0.2]), wrong, fraction=0.5)
        0.5
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and up to 1, got {fraction}.")
    values, count = _checked(self_influence, wrong)
    inspected = max(1, round(fraction * len(values)))
    last = values.sort(descending=True).values[inspected - 1]
    above, tied = values > last, values == last
    share = (inspected - int(above.sum())) / int(tied.sum())
    return (int((wrong & above).sum()) + share * int((wrong & tied).sum())) / count


def _checked(self_influence: Scores | Tensor | None, wrong: Tensor) -> tuple[Tensor, int]:
    """Self-influence in float64, and how many examples are wrong."""
    if isinstance(self_influence, Scores):
        notes = self_influence.provenance.get("notes", [])
        reasons = [note for note in notes if note.startswith("No self-influence")]
        self_influence = self_influence.self_influence
    else:
        reasons = []
    if self_influence is None:
        reason = reasons[0] if reasons else "Attribute with self_influence=True."
        raise ValueError(f"These scores hold no self-influence. {reason}")
    if wrong.dtype != torch.bool or wrong.shape != self_influence.shape:
        raise ValueError(
            f"wrong must be bool of shape {list(self_influence.shape)}, got {wrong.dtype} of shape "
            f"{list(wrong.shape)}."
        )
    count = int(wrong.sum())
    if count in (0, len(wrong)):
        raise ValueError(
            f"{count} of {len(wrong)} examples are marked wrong; expected some of both kinds."
        )
    if not bool(self_influence.isfinite().all()):
        raise ValueError("Some self-influence is not finite, so it cannot be ranked.")
    return self_influence.double().cpu(), count


def agreement(first: Scores | Tensor, second: Scores | Tensor) -> Interval:
    """Spearman's correlation between two estimators' scores, averaged over the queries."""
    a, b = complete(first), complete(second)
    if a.shape != b.shape:
        raise ValueError(
            f"Expected scores of the same queries and training examples, got shapes "
            f"{list(a.shape)} and {list(b.shape)}."
        )
    a, b = a.double().cpu(), b.double().cpu()
    # Constant scores rank nothing, in either of the two.
    per_query = rank_correlation(a, b).where((a != a[:, :1]).any(1), torch.nan)
    if bool(per_query.isnan().all()):
        raise NothingToRankError(
            "The scores of every query are constant in one of the two: there is nothing to rank."
        )
    return bootstrap(per_query)


def as_removal(scores: Scores | Tensor) -> Tensor:
    r"""Scores for true removal at the same number of steps, given those for weight 0.

    .. math::
        s' = \frac{N}{N - 1} \Big(s - \frac1N \sum_n s_n\Big)

    With weight 0 a batch keeps its denominator. With removal the other examples take over the share
    of the removed one, which changes slopes and sums over groups but not the ranking of examples.
    """
    values = complete(scores)
    train = values.shape[1]
    return train / (train - 1) * (values - values.mean(dim=1, keepdim=True))


@dataclass(frozen=True)
class RemovalAgreement:
    """Predicted changes of measurements against those of retraining.

    Attributes:
        slope: of the true change on the predicted one, through the origin, over all pairs; 1 if
            the unit is right.
        correlation: Pearson's, over all pairs; NaN where either is constant.
        rank: Spearman's over the retrainings, averaged over queries.
    """

    slope: float
    correlation: float
    rank: Interval


def leave_one_out(
    scores: Scores | Tensor, left_out: Tensor, outcomes: Tensor, baseline: Tensor
) -> RemovalAgreement:
    """Compare scores with the change of the measurement when an example is left out.

    Truth and scores must mean the same: weight 0, as in
    :func:`~tda_lightning.evaluation.retrain`, or removal, with scores from :func:`as_removal`.

    Args:
        scores: [query, train].
        left_out: the example left out of each retraining, int64 [retraining].
        outcomes: measurements after each retraining, [retraining, query].
        baseline: measurements with all examples, [query].
    """
    values = scores.values if isinstance(scores, Scores) else scores
    kept = torch.ones(len(left_out), values.shape[1], dtype=torch.bool)
    kept[torch.arange(len(left_out)), left_out] = False
    return group_removal(scores, kept, outcomes, baseline)


def group_removal(
    scores: Scores | Tensor,
    kept: Tensor,
    outcomes: Tensor,
    baseline: Tensor,
    removed: bool = False,
) -> RemovalAgreement:
    """Compare sums of scores with the change of the measurement when groups are left out.

    Args:
        scores: [query, train].
        kept: which examples each retraining kept, bool [retraining, train].
        outcomes: measurements after each retraining, [retraining, query].
        baseline: measurements with all examples, [query]; under the protocol *algorithm* their
            mean over the same number of fresh seeds.
        removed: see :func:`predicted_changes`.

    Raises:
        NothingToRankError: fewer than 3 retrainings, or every measurement is constant.
    """
    predicted = predicted_changes(scores, kept, removed)
    queries, retrainings = predicted.shape
    if outcomes.shape != (retrainings, queries) or baseline.shape != (queries,):
        raise ValueError(
            f"Expected outcomes [{retrainings}, {queries}] and baseline [{queries}], got "
            f"{list(outcomes.shape)} and {list(baseline.shape)}."
        )
    if retrainings < 3:
        raise NothingToRankError(
            f"A rank correlation needs at least 3 retrainings, got {retrainings}."
        )
    truth = (outcomes.double() - baseline.double()).cpu().T
    return RemovalAgreement(
        *slope_and_correlation(predicted, truth), bootstrap(rank_correlation(predicted, truth))
    )


def slope_and_correlation(predicted: Tensor, truth: Tensor) -> tuple[float, float]:
    """Slope of ``truth`` on ``predicted`` through the origin, and Pearson's correlation, both over
    all entries; NaN where undefined.

    Example:
        >>> slope_and_correlation(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0]))
        (3.0, 1.0)
    """
    size = float(predicted.square().sum())
    pairs = torch.stack([predicted.flatten(), truth.flatten()])
    slope = float((predicted * truth).sum()) / size if size else math.nan
    return slope, float(torch.corrcoef(pairs)[0, 1])


def predicted_changes(scores: Scores | Tensor, kept: Tensor, removed: bool = False) -> Tensor:
    r"""The predicted change of each measurement if only ``kept`` is left: float64 [query,
    retraining].

    With weight 0 this is the sum over what is left out. If a group :math:`G` of :math:`k` examples
    is removed at the same number of steps, the others take over its share of every batch, and to
    first order the change is

    .. math::
        \frac{N}{N - k} \Big(\sum_{n \in G} s_n - \frac{k}{N} \sum_n s_n\Big),

    which is :func:`as_removal` for a single example.

    Args:
        scores: [query, train].
        kept: bool [retraining, train].
        removed: the examples are really removed, as under *algorithm*, instead of at weight 0.
    """
    values = complete(scores).double().cpu()
    train = values.shape[1]
    if kept.dtype != torch.bool or kept.dim() != 2 or kept.shape[1] != train:
        raise ValueError(
            f"kept must be bool [retraining, {train}], True for the examples kept, got "
            f"{kept.dtype} of shape {list(kept.shape)}."
        )
    left_out = (~kept).double()
    sums = values @ left_out.T
    if not removed:
        return sums
    count = left_out.sum(1)
    if bool((count == train).any()):
        raise ValueError("A retraining must keep at least one example.")
    return train / (train - count) * (sums - values.sum(1, keepdim=True) * count / train)
