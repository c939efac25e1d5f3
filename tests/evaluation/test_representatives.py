"""Representatives of a query's proponents, against all sets of their number."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tda_lightning import Scores
from tda_lightning.evaluation import representatives


def value(weights, similar, chosen):
    return float(weights @ similar[:, list(chosen)].max(1).values / weights.sum())


def test_the_value_is_within_the_bound_of_the_best_set():
    own = torch.Generator().manual_seed(0)
    worst = 1.0
    for _ in range(10):
        scores = torch.randn(1, 14, generator=own).double()
        features = torch.randn(14, 3, generator=own).double()
        found = representatives(Scores(scores), features, query=0, k=3)
        directions = F.normalize(features, dim=1)
        similar, weights = (directions @ directions.T).clamp(min=0), scores[0].clamp(min=0)
        places = (scores[0] > 0).nonzero().squeeze(1).tolist()
        best = max(value(weights, similar, c) for c in itertools.combinations(places, 3))
        assert found.covered == pytest.approx(value(weights, similar, found.examples.tolist()))
        assert (
            set(found.examples.tolist()) <= set(places) and len(set(found.examples.tolist())) == 3
        )
        assert found.covered >= (1 - 1 / math.e) * best
        assert float(found.shares.sum()) == pytest.approx(1)
        worst = min(worst, found.covered / best)
    assert worst > 0.9


def test_one_stands_for_each_group_of_copies():
    """Copies of the strongest would fill the list of proponents."""
    features = torch.eye(3)[[0, 0, 0, 0, 1, 2, 2]]
    scores = Scores(torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 2.0, -3.0]]))
    found = representatives(scores, features, query=0, k=3)
    assert found.examples.tolist() == [0, 4, 5]
    assert found.shares.tolist() == pytest.approx([30 / 37, 5 / 37, 2 / 37])
    assert found.covered == pytest.approx(1)
    assert scores.proponents(0, 3)[0].tolist() == [0, 1, 2]


def test_what_cannot_be_represented_is_refused():
    scores = Scores(torch.tensor([[1.0, -1.0, math.nan]]), candidates=torch.tensor([[0, 1]]))
    assert representatives(scores, torch.eye(3), 0, k=1).examples.tolist() == [0]
    with pytest.raises(ValueError, match="number of proponents of query 0, 1; got 2"):
        representatives(scores, torch.eye(3), 0, k=2)
    with pytest.raises(ValueError, match=r"must be \[3, feature\]"):
        representatives(scores, torch.eye(2), 0, k=1)
