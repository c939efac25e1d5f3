"""A few training examples that stand for all proponents of a query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tda_lightning.records.scores import Scores


@dataclass(frozen=True)
class Representatives:
    """What stands for a query's proponents.

    Attributes:
        examples: training examples, the most representative first, int64 [k].
        shares: share of all positive scores that belongs to proponents nearest to each of them,
            float64 [k]; they sum to 1.
        covered: how well all of them together are stood for, 0 to 1: the mean similarity of a
            proponent to its representative, weighted by its score.
    """

    examples: Tensor
    shares: Tensor
    covered: float


def representatives(scores: Scores, features: Tensor, query: int, k: int = 5) -> Representatives:
    r"""The ``k`` proponents that are most like all others, each weighted by its score.

    The strongest proponents are often near copies of each other. This takes the set R that
    maximises, step by step,

    .. math::
        \frac{\sum_n s_n^+ \max_{r \in R} c_{nr}^+}{\sum_n s_n^+}

    with :math:`c` the cosine of features. Each step adds the example that gains most, which comes
    within 1 - 1/e of the best set (Nemhauser et al. 1978, facility location).

    Args:
        scores: [query, train].
        features: of the training examples [train, feature], such as the last layer's inputs.
        query: which.
        k: number of representatives, at most that of the proponents.

    Raises:
        ValueError: fewer than ``k`` proponents, or other features.

    Example:
        >>> scores = Scores(torch.tensor([[5.0, 5.0, 4.0, -9.0]]))
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> representatives(scores, features, query=0, k=2).examples
        tensor([0, 2])
    """
    if features.ndim != 2 or len(features) != scores.num_train:
        raise ValueError(
            f"features must be [{scores.num_train}, feature], got {list(features.shape)}."
        )
    row = torch.nan_to_num(scores.values[query].double().cpu())
    proponents = (row > 0).nonzero().squeeze(1)
    if not 1 <= k <= len(proponents):
        raise ValueError(
            f"k must be between 1 and the number of proponents of query {query}, "
            f"{len(proponents)}; got {k}."
        )
    weights = row[proponents] / row[proponents].sum()
    directions = F.normalize(features[proponents].double().cpu(), dim=1)
    similar = (directions @ directions.T).clamp(min=0)  # [proponent, candidate]
    best = torch.zeros(len(proponents), dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(k):
        gains = weights @ (similar - best[:, None]).clamp(min=0)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        best = torch.maximum(best, similar[:, chosen[-1]])
    nearest = similar[:, chosen].argmax(1)
    shares = torch.zeros(k, dtype=torch.float64).index_add_(0, nearest, weights)
    return Representatives(proponents[chosen], shares, float(weights @ best))
