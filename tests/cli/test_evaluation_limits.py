"""What can be reached, as the table of ``tda evaluate`` shows it."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console

from tda_lightning import Scores
from tda_lightning.cli.evaluation_limits import evaluation_limits
from tda_lightning.cli.evaluation_table import (
    evaluation_json,
    evaluation_notes,
    evaluation_table,
    judge,
)
from tda_lightning.evaluation import GroundTruth, draw_seeds, draw_subsets, seed_ceiling
from tda_lightning.records.ground_truth import RECORDED_SEED


def truth(
    protocol: str = "algorithm", subsets: int = 60, seeds: int = 2, noise: float = 1.0
) -> tuple[Scores, GroundTruth]:
    """Additive measurements with noise between seeds, and the coefficients as scores."""
    generator = torch.Generator().manual_seed(0)
    kept = draw_subsets(30, 0.5, subsets)
    scores = torch.randn(5, 30, generator=generator).double()
    exact = -(kept.double() @ scores.T)[:, None]
    shape = (subsets, seeds, 5)
    outcomes = exact + noise * exact.std() * torch.randn(shape, generator=generator).double()
    asked = GroundTruth.unmeasured(
        protocol,
        kept,
        draw_seeds(subsets, seeds),
        torch.zeros(5),
        {},  # type: ignore[arg-type]
    )
    if protocol != "algorithm":
        asked = replace(asked, seeds=torch.full((subsets, seeds), RECORDED_SEED))
    return Scores(scores), replace(asked, outcomes=outcomes, done=torch.ones(subsets, seeds).bool())


def printed(table, width: int = 200) -> str:
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_best_scores_reach_the_limit() -> None:
    scores, made = truth()
    limits = evaluation_limits(made)
    row = judge("exact", scores, made)
    assert limits.seeds.over_queries.value == seed_ceiling(made.outcomes).over_queries.value
    for limit in (limits.seeds, limits.additive):
        assert limit.over_subsets.low < row.over_queries.value < limit.over_subsets.high
    assert limits.fitted.over_queries.value < row.over_queries.value
    shown = printed(evaluation_table([row], "algorithm", limits))
    names = [line.split("│")[1].strip() for line in shown.splitlines() if "│" in line]
    assert " ".join(" ".join(names).split()) == "exact limit: seeds limit: additive linear fit"
    share = row.over_queries.value / limits.seeds.over_queries.value
    assert f"{share:.0%}" in shown
    found = evaluation_json([row], made, 1.0, {}, limits)["limits"]
    assert found["seeds"]["lds"] == limits.seeds.over_queries.value
    assert all(part is not None for part in found.values())


def test_nothing_is_cut_off_in_a_narrow_terminal() -> None:
    scores, made = truth()
    limits = evaluation_limits(made)
    row = replace(judge("gradient_dot", scores, made), seconds=15.0, keep=0.5, slope=-0.000123)
    shown = printed(evaluation_table([row], "algorithm", limits), width=80)
    assert "15.0 s" in shown and "-0.000123" in shown and "gradient_dot" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_what_is_not_known_is_said() -> None:
    scores, made = truth(seeds=1)
    limits = evaluation_limits(made)
    assert limits.seeds is None
    notes = evaluation_notes([judge("exact", scores, made)], made, 1.0, limits)
    assert "seeds=2 tells" in notes
    assert "of limit" not in printed(evaluation_table([], "algorithm", limits))
    _, few = truth(subsets=6, noise=2)
    (_, additive) = evaluation_limits(few).notes
    assert additive.startswith("What additive scores can reach is not told by 6 subsets of 30")
    _, three = truth(subsets=3, seeds=2)
    assert "is not told by 3 subsets: more than three tell" in evaluation_limits(three).notes[0]
    _, single = truth("single_run", seeds=1, noise=0)
    replayed = evaluation_limits(single)
    assert replayed.seeds is None and replayed.additive is not None  # seeds are no question there
    assert not any("seeds" in note for note in replayed.notes)


def test_what_measures_the_same_whatever_is_left_out_has_no_limit() -> None:
    _, made = truth(seeds=1)
    constant = evaluation_limits(replace(made, outcomes=torch.ones(60, 1, 5).double()))
    assert constant.rows() == []
    one = replace(made, subsets=~torch.eye(30, dtype=torch.bool).repeat(2, 1))
    assert evaluation_limits(one).rows() == [] and evaluation_limits(one).notes == []
