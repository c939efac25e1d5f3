"""Scores by groups on both sides, against sums worked out by hand."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from tda_lightning import Scores
from tda_lightning.evaluation import feature_clusters
from tda_lightning.report import interactions

VALUES = torch.tensor([[1.0, 2.0, -4.0, 0.5], [3.0, 0.0, 2.0, -1.0], [-1.0, -1.0, 6.0, 2.0]])
TRAIN = ["cat", "cat", "dog", "<owl>"]


def test_sums_means_and_shares_by_hand():
    found = interactions(Scores(VALUES), TRAIN, torch.tensor([1, 0, 1]))
    assert found.train == ["<owl>", "cat", "dog"] and found.query == [0, 1]
    assert found.sizes.tolist() == [1, 2, 1] and found.queries.tolist() == [1, 2]
    # Query 1 alone; queries 0 and 2 together.
    assert found.sums.tolist() == [[-1, 3, 2], [1.25, 0.5, 1]]
    assert found.means.tolist() == [[-1, 1.5, 2], [1.25, 0.25, 1]]
    assert found.helps.tolist() == [[0, 0.5, 1], [1, 0.5, 0.5]]


def test_the_table_and_the_picture_say_the_same():
    found = interactions(Scores(VALUES), TRAIN, [1, 0, 1])
    first, _, *rows = found.table().splitlines()
    assert first == "| | <owl> (1) | cat (2) | dog (1) |"
    assert rows[0] == "| 0 (1) | -1 (0%) | +3 (50%) | +2 (100%) |"
    picture = ElementTree.fromstring(found.picture())
    name = "{http://www.w3.org/2000/svg}"
    cells = [cell for cell in picture.iter(f"{name}rect") if cell.find(f"{name}title") is not None]
    assert len(cells) == 6
    assert cells[0].find(f"{name}title").text == "0 from <owl>: -1, 0% help"
    assert cells[0].get("fill") == "rgba(209,98,45,0.500)"  # half of the largest mean, and harms
    assert cells[2].get("fill") == "rgba(47,127,181,1.000)"


def test_clusters_are_those_of_the_features():
    own = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    members = torch.tensor([0] * 20 + [1] * 12 + [2] * 5)
    train = centres[members] + torch.randn(37, 2, generator=own)
    groups, asked = feature_clusters(train, centres[[2, 0, 1]], 3)
    assert groups == [f"cluster {n + 1}" for n in members.tolist()]  # the largest is the first
    assert asked == ["cluster 3", "cluster 1", "cluster 2"]
    with pytest.raises(ValueError, match="between 1 and 37"):
        feature_clusters(train, centres, 38)


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one label for each of the 3 queries, got 2"):
        interactions(Scores(VALUES), TRAIN, [0, 1])
    with pytest.raises(ValueError, match="one label for each of the 4"):
        interactions(Scores(VALUES), TRAIN[:3], [0, 1, 1])
