"""The order in which an interval is walked, simulated: everything once, within the budget."""

from __future__ import annotations

import pytest

from tda_lightning.estimators.unrolled.moves import least_budget, plan_moves


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 16, 100])
@pytest.mark.parametrize(("state", "standstill"), [(7, 3), (3, 7), (5, 5)])
@pytest.mark.parametrize("room", [0, 1, 5, 20, 60, 1000])
def test_every_step_is_walked_back_once_within_the_budget(
    room: int, state: int, standstill: int, steps: int
) -> None:
    first, budget = 4, least_budget(steps, state, standstill) + room
    kept: list[int] = []  # rows whose states are in memory
    cuts: set[int] = set()  # rows before which there is a standstill
    left = list(range(first, first + steps))
    walked = 0
    for move in plan_moves(first, first + steps, budget, state, standstill):
        if move.kind == "back":
            for row in move.rows():
                assert row == left.pop() == kept.pop()
            assert not kept
            continue
        assert move.start == first or move.start in cuts
        assert list(move.rows()) == list(range(move.start, move.stop))
        walked += len(move.rows())
        if move.kind == "keep":
            cuts.discard(move.start)
            kept = list(move.rows())
        else:
            assert all(move.start < cut <= move.stop for cut in move.cuts)
            cuts.update(move.cuts)
        assert len(kept) * state + len(cuts) * standstill <= budget
    assert not left and not kept and not cuts
    assert walked <= steps * steps
    if steps * state <= budget:
        assert walked == steps
