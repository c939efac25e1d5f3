"""What the scores say of every training example: how suspicious it is, and which label fits it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tda_lightning.records.scores import Scores
from tda_lightning.report.columns import Column

_STRONGEST = 0.01  # share of the training set among which an opponent harms a query


@dataclass(frozen=True)
class Triage:
    """One number for each training example, [train].

    Attributes:
        harmed: number of queries for which it is among the strongest 1% of opponents.
        net: its scores summed over the queries.
        disagreement: its mean harm to the queries of the class, other than its own, that it harms
            most; None where labels are unknown. A wrong label harms the class that it hides.
        suggested: that class, int64; -1 for none.
    """

    harmed: Tensor
    net: Tensor
    disagreement: Tensor | None
    suggested: Tensor | None


def triage(scores: Scores, label: Column | None, helps: int = 1) -> Triage:
    """Walks over the queries once; examples without a score count as 0.

    Args:
        helps: sign of a score that helps.
    """
    harmed = torch.zeros(scores.num_train, dtype=torch.int64)
    net = torch.zeros(scores.num_train, dtype=torch.float64)
    few = max(1, math.ceil(_STRONGEST * scores.num_scored))
    known = label is not None and label.query is not None
    count = len(label.groups) if label is not None else 0
    by_class = torch.zeros(count if known else 0, scores.num_train, dtype=torch.float64)
    for query, values in enumerate(scores.values):
        row = helps * torch.nan_to_num(values.double())
        net += helps * row
        lowest = row.topk(few, largest=False)
        harmed[lowest.indices[lowest.values < 0]] += 1
        if known and label is not None and label.query is not None:
            by_class[int(label.query[query])] += row
    if not known or label is None or label.query is None:
        return Triage(harmed, net, None, None)
    sizes = torch.from_numpy(np.bincount(label.query, minlength=count))
    harm = -by_class / sizes.clamp(min=1)[:, None]
    harm[sizes == 0] = -torch.inf
    own = torch.from_numpy(label.train)[None]
    worst, suggested = harm.scatter(0, own, -torch.inf).max(0)
    none = ~(worst > 0)
    return Triage(harmed, net, worst.masked_fill(none, 0.0), suggested.masked_fill(none, -1))
