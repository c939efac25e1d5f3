"""Which of the proponents on a query's list stand for the others on it."""

from __future__ import annotations

import torch
from torch import Tensor

from tda_lightning.records.representatives import representatives
from tda_lightning.records.scores import Scores

_FEW = 4  # representatives of a query
_FEWEST_LISTED = 8  # proponents for which they are worth while
_FEWEST_QUERIES = 5  # whose scores tell training examples apart


def stand_ins(
    scores: Scores, row: int, listed: Tensor, helps: int, features: Tensor | None
) -> Tensor | None:
    """What share of the listed proponents' scores each of them stands for, 0 for all but a few:
    float64 [listed]; None where there is too little to tell.

    Without ``features``, training examples are alike as far as their scores for all queries are: a
    product of gradients with those of the queries, and so a sketch of what an example teaches.

    Args:
        row: the query.
        listed: training examples on its list, int64.
        helps: sign of the scores of those that help.
        features: of the training examples, [train, feature].
    """
    values = torch.nan_to_num(helps * scores.values[:, listed].double().cpu())
    if int((values[row] > 0).sum()) < _FEWEST_LISTED:
        return None
    if features is None and scores.num_queries < _FEWEST_QUERIES:
        return None
    alike = values.T if features is None else features[listed]
    found = representatives(Scores(values[row : row + 1]), alike, query=0, k=_FEW)
    shares = torch.zeros(len(listed), dtype=torch.float64)
    shares[found.examples] = found.shares
    return shares
