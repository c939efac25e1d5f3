"""Scores against other truths than subsets: flipped labels, other scores, single examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

from tda_lightning.evaluation.lds import Interval, bootstrap, rank_correlation
from tda_lightning.scores import Scores


def detection_auc(self_influence: Scores | Tensor, wrong: Tensor) -> float:
    """Area under the ROC curve of finding ``wrong`` examples by large self-influence.

    The chance that a wrong example is ranked above a right one, ties counting half (Mann &
    Whitney 1947). A mislabelled example is learned by itself alone, so its own removal costs most.

    Args:
        self_influence: [train], or scores that hold it.
        wrong: bool [train].

    Example:
        >>> detection_auc(torch.tensor([0.1, 0.9, 0.3]), torch.tensor([False, True, False]))
        1.0
    """
    if isinstance(self_influence, Scores):
        if self_influence.self_influence is None:
            raise ValueError("These scores hold no self-influence: attribute with it switched on.")
        self_influence = self_influence.self_influence
    if wrong.dtype != torch.bool or wrong.shape != self_influence.shape:
        raise ValueError(
            f"wrong must be bool of shape {list(self_influence.shape)}, got {wrong.dtype} of shape "
            f"{list(wrong.shape)}."
        )
    count = int(wrong.sum())
    if count in (0, len(wrong)):
        raise ValueError(
            f"{count} of {len(wrong)} examples are marked wrong; an AUC needs some of both kinds."
        )
    ranks = torch.from_numpy(rankdata(self_influence.double().cpu().numpy()))
    above = float(ranks[wrong].sum()) - count * (count + 1) / 2
    return above / (count * (len(wrong) - count))


def agreement(first: Scores | Tensor, second: Scores | Tensor) -> Interval:
    """Spearman's correlation between two estimators' scores, averaged over the queries."""
    a, b = (item.values if isinstance(item, Scores) else item for item in (first, second))
    if a.shape != b.shape:
        raise ValueError(
            f"Expected scores of the same queries and training examples, got shapes "
            f"{list(a.shape)} and {list(b.shape)}."
        )
    return bootstrap(rank_correlation(a.double().cpu(), b.double().cpu()))


def as_removal(scores: Scores | Tensor) -> Tensor:
    r"""Scores for true removal at the same number of steps, from those for weight 0.

    .. math::
        s' = \frac{N}{N - 1} \Big(s - \frac1N \sum_n s_n\Big)

    With weight 0 a batch keeps its denominator. Removal gives the others its share back, which
    changes the slope and the sums over groups, and no ranking of single examples.
    """
    values = scores.values if isinstance(scores, Scores) else scores
    train = values.shape[1]
    return train / (train - 1) * (values - values.mean(dim=1, keepdim=True))


@dataclass(frozen=True)
class LeaveOneOut:
    """Scores of single examples against retraining without each.

    Attributes:
        slope: of the true change on the predicted one, through the origin, over all pairs; 1 when
            the unit is right.
        correlation: Pearson's, over all pairs.
        rank: Spearman's over the examples left out, averaged over queries.
    """

    slope: float
    correlation: float
    rank: Interval


def leave_one_out(
    scores: Scores | Tensor, left_out: Tensor, outcomes: Tensor, baseline: Tensor
) -> LeaveOneOut:
    """Compare scores with the change of the measurement when an example is left out.

    The truth and the scores must mean the same thing: weight 0 as in
    :func:`~tda_lightning.evaluation.retrain`, or removal with scores from :func:`as_removal`.

    Args:
        scores: [query, train].
        left_out: the example that each retraining left out, int64 [retraining].
        outcomes: measurements after each retraining, [retraining, query].
        baseline: measurements with all examples, [query].
    """
    values = scores.values if isinstance(scores, Scores) else scores
    if outcomes.shape != (len(left_out), len(values)) or baseline.shape != (len(values),):
        raise ValueError(
            f"Expected outcomes [{len(left_out)}, {len(values)}] and baseline [{len(values)}], got "
            f"{list(outcomes.shape)} and {list(baseline.shape)}."
        )
    predicted = values.double().cpu()[:, left_out]
    truth = (outcomes.double() - baseline.double()).cpu().T
    pairs = torch.stack([predicted.flatten(), truth.flatten()])
    return LeaveOneOut(
        slope=float((predicted * truth).sum() / predicted.square().sum()),
        correlation=float(torch.corrcoef(pairs)[0, 1]),
        rank=bootstrap(rank_correlation(predicted, truth)),
    )
