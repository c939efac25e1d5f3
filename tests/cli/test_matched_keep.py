"""Scores of one question, judged by another."""

from __future__ import annotations

import pytest
import torch

from tda_lightning import Scores
from tda_lightning.cli.matched_keep import alpha_of, keep_notes, keep_of


def scores(keep: float | None) -> Scores:
    asked = {} if keep is None else {"what_if": {"keep": keep, "weights": "uniform"}}
    return Scores(torch.zeros(2, 3), provenance=asked)


def test_alpha_is_the_keep_that_all_scores_share() -> None:
    assert keep_of(scores(None)) == 1 and keep_of(scores(0.3)) == 0.3
    assert alpha_of({"a": scores(0.3), "b": scores(0.3)}) == 0.3
    assert alpha_of({"a": scores(0.3), "b": scores(None)}) == 0.5
    assert alpha_of({"a": scores(None)}) == alpha_of({}) == 0.5


def test_another_question_is_said_with_the_command_that_asks_it() -> None:
    keeps = {"tracin": 1.0, "source": 1.0, "exact": 0.8, "matched": 0.5}
    (note,) = keep_notes(keeps, 0.5, "runs/digits")
    assert note == (
        "Judged where 50% of the data are kept, with derivatives taken where 100% (tracin, source) "
        "and 80% (exact) are. Scores for this question: tda attribute runs/digits keep=0.5"
    )
    assert keep_notes({"matched": 0.5}, 0.5004, "runs/digits") == []
    assert keep_notes({"tracin": 1.0}, 0.95, "runs/digits") == []  # few go
    assert keep_notes({}, 0.5, "runs/digits") == []


@pytest.mark.parametrize("kept", [0.99, 0.999])
def test_what_few_examples_do_is_asked_at_the_run_itself(kept) -> None:
    (note,) = keep_notes({"half": 0.5}, kept, "runs/digits")
    assert note.endswith("keep=1")
