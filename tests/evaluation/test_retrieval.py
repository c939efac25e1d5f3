"""Judgements that need no retraining, against numbers worked out by hand and scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score

from tda_lightning import Scores
from tda_lightning.evaluation import (
    average_precision,
    recall_within,
    reciprocal_rank,
    shared_group,
    times_similarity,
    top_cardinality,
)
from tda_lightning.evaluation.linear_datamodeling import NothingToRankError

# Two queries, six training examples of the classes 0, 0, 1, 1, 2, 2.
VALUES = torch.tensor([[9.0, 1.0, 8.0, 7.0, 6.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
CLASSES = torch.tensor([0, 0, 1, 1, 2, 2])


def test_the_share_of_proponents_of_the_own_class():
    # Query 0, class 0: proponents 0, 2, 3, of which one; query 1, class 2: 5, 4, 3, of which two.
    found = shared_group(VALUES, CLASSES, torch.tensor([0, 2]), k=3)
    assert found.per_query.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert found.value == pytest.approx(0.5)
    words = ["a", "a", "b", "b", "c", "c"]
    assert shared_group(Scores(VALUES), words, ["a", "c"], k=3).value == pytest.approx(0.5)
    assert shared_group(VALUES, CLASSES, [7, 7], k=6).value == 0


def test_all_proponents_hold_each_class_as_often_as_the_training_set():
    assert shared_group(VALUES, CLASSES, [0, 1], k=6).value == pytest.approx(2 / 6)


def test_average_precision_is_that_of_scikit_learn_with_ties():
    own = torch.Generator().manual_seed(0)
    values = torch.randint(5, (7, 40), generator=own).double()  # many ties
    sought = torch.rand(7, 40, generator=own) < 0.3
    found = average_precision(values, sought)
    expected = [
        average_precision_score(mask, row)
        for mask, row in zip(sought.numpy(), values.numpy(), strict=True)
    ]
    assert found.per_query.tolist() == pytest.approx(expected, rel=1e-12)
    shared = average_precision(values, sought[0])
    assert shared.per_query[0] == pytest.approx(expected[0])


def test_what_is_found_first_and_what_is_found_last():
    sought = torch.tensor([True, False, False, False, False, True])
    # Ranks 1 and 5 in the first query, 1 and 6 in the second.
    found = average_precision(VALUES, sought)
    assert found.per_query.tolist() == pytest.approx([(1 + 2 / 5) / 2, (1 + 2 / 6) / 2])
    assert recall_within(VALUES, sought, k=2).per_query.tolist() == [0.5, 0.5]
    assert recall_within(VALUES, sought, k=6).value == 1
    assert reciprocal_rank(VALUES, ~sought).value == pytest.approx(0.5)
    each = torch.stack([sought, CLASSES == 0])
    assert reciprocal_rank(VALUES, each).per_query.tolist() == pytest.approx([1, 1 / 5])


def test_queries_for_which_nothing_is_sought_are_left_out():
    sought = torch.stack([CLASSES == 0, CLASSES == 9])
    for judge in (average_precision, reciprocal_rank):
        found = judge(VALUES, sought)
        assert found.per_query.isnan().tolist() == [False, True]
        assert found.value == pytest.approx(float(found.per_query[0]))
    assert recall_within(VALUES, sought, k=1).value == 0.5
    with pytest.raises(NothingToRankError, match="Nothing is sought"):
        average_precision(VALUES, CLASSES == 9)


def test_examples_without_a_score_come_last():
    values = VALUES.clone()
    values[0, 0] = torch.nan  # was the first
    sought = torch.tensor([True, False, False, False, False, False])
    assert average_precision(values, sought).per_query[0] == pytest.approx(1 / 6)
    assert shared_group(values, CLASSES, [1, 2], k=2).per_query[0] == 1


def test_the_number_of_different_proponents():
    same = VALUES[:1].expand(4, -1)
    assert top_cardinality(same, k=2) == pytest.approx(1 / 4)
    assert top_cardinality(torch.eye(5), k=1) == 1
    assert top_cardinality(VALUES, k=3) == pytest.approx(5 / 6)  # 0 2 3 and 5 4 3


def test_scores_times_similarity_rank_among_similar_examples_alone():
    cosines = torch.tensor([[0.5, 1.0, -1.0, 0.0, 1.0, -0.5], [1.0] * 6])
    found = times_similarity(Scores(VALUES, provenance={"estimator": "TracIn"}), cosines)
    assert found.values[0].tolist() == [4.5, 1, 0, 0, 6, 0]
    assert torch.equal(found.values[1], VALUES[1])
    assert found.provenance["estimator"] == "TracIn x similarity"
    with pytest.raises(ValueError, match=r"Expected similarities of shape \[2, 6\]"):
        times_similarity(Scores(VALUES), cosines[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shared_group(VALUES, CLASSES[:5], [0, 1]), "2 queries and 6 training"),
        (lambda: shared_group(VALUES, CLASSES, [0, 1], k=7), "between 1 and the number"),
        (lambda: recall_within(VALUES, CLASSES == 0, k=0), "between 1 and the number"),
        (lambda: average_precision(VALUES, CLASSES), "sought must be bool"),
        (lambda: average_precision(VALUES, (CLASSES == 0)[:5]), "sought must be bool"),
        (lambda: top_cardinality(VALUES[0]), r"Expected scores \[query, train\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
