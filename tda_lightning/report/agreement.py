"""How far several files of scores agree, or the runs of an ensemble, query by query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.records.scores import Scores

_TOP = 50


@dataclass(frozen=True)
class Agreement:
    """Of other scores with those of the page.

    Attributes:
        rank: Spearman's correlation over the training examples, one for each query asked.
        overlap: share of the strongest 50 proponents that are the same, likewise.
        self_influence: Spearman's correlation of the self-influences; None where one has none.
    """

    rank: list[float]
    overlap: list[float]
    self_influence: float | None


def require_comparable(scores: Scores, others: Mapping[str, Scores]) -> None:
    """Refuse scores about other queries or other training examples.

    Raises:
        ValueError: names the scores.
    """
    for name, other in others.items():
        if other.values.shape != scores.values.shape:
            raise ValueError(
                f"Scores can be compared if they are about the same queries and training examples: "
                f"expected {list(scores.values.shape)}, got {list(other.values.shape)} in {name}."
            )


def agreement(scores: Scores, other: Scores, queries: Sequence[int], helps: int = 1) -> Agreement:
    """Agreement for each of ``queries``, over the examples that both have scored."""
    rank, overlap = [], []
    for query in queries:
        one, two = scores.values[query].double(), other.values[query].double()
        both = ~(one.isnan() | two.isnan())
        one, two = one[both], two[both]
        rank.append(spearman(one, two))
        top = min(_TOP, len(one))
        shared = {*(helps * one).topk(top).indices.tolist()} & {
            *(helps * two).topk(top).indices.tolist()
        }
        overlap.append(len(shared) / top if top else 0.0)
    own = None
    if scores.self_influence is not None and other.self_influence is not None:
        own = spearman(scores.self_influence.double(), other.self_influence.double())
    return Agreement(rank, overlap, own)


def ranks(values: Tensor) -> Tensor:
    """Positions from the largest, 0 first; unscored examples come last."""
    order = torch.nan_to_num(values, nan=-torch.inf).argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places


def spearman(one: Tensor, two: Tensor) -> float:
    """Correlation of mean ranks; 0 where either is constant.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0]))
        1.0
    """
    one, two = _mean_ranks(one), _mean_ranks(two)
    one, two = one - one.mean(), two - two.mean()
    size = float(one.norm() * two.norm())
    return round(float(one @ two) / size, 12) if size > 0 else 0.0


def _mean_ranks(values: Tensor) -> Tensor:
    """Ties have the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]


def agreement_of_members(scores: Scores, query: int) -> float | None:
    """Mean rank correlation between the first runs of an ensemble about one query."""
    if scores.members is None:
        return None
    rows = [torch.nan_to_num(member[query].double()) for member in scores.members[:6]]
    pairs = [spearman(one, two) for place, one in enumerate(rows) for two in rows[place + 1 :]]
    return sum(pairs) / len(pairs)
