"""The order in which an interval is walked, simulated: everything once, within the budget."""

from __future__ import annotations

import pytest

from tda_lightning.estimators.unrolled.sweeps import least_budget, plan_sweeps


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 16, 100])
@pytest.mark.parametrize(("state", "snapshot"), [(7, 3), (3, 7), (5, 5)])
@pytest.mark.parametrize("room", [0, 1, 5, 20, 60, 1000])
def test_every_step_is_walked_back_once_within_the_budget(
    room: int, state: int, snapshot: int, steps: int
) -> None:
    first, budget = 4, least_budget(steps, state, snapshot) + room
    kept: list[int] = []  # rows whose states are in memory
    cuts: set[int] = set()  # rows before which there is a snapshot
    left = list(range(first, first + steps))
    walked = 0
    for sweep in plan_sweeps(first, first + steps, budget, state, snapshot):
        if sweep.kind == "reverse":
            for row in sweep.rows():
                assert row == left.pop() == kept.pop()
            assert not kept
            continue
        assert sweep.start == first or sweep.start in cuts
        assert list(sweep.rows()) == list(range(sweep.start, sweep.stop))
        walked += len(sweep.rows())
        if sweep.kind == "record":
            cuts.discard(sweep.start)
            kept = list(sweep.rows())
        else:
            assert all(sweep.start < cut <= sweep.stop for cut in sweep.cuts)
            cuts.update(sweep.cuts)
        assert len(kept) * state + len(cuts) * snapshot <= budget
    assert not left and not kept and not cuts
    assert walked <= steps * steps
    if steps * state <= budget:
        assert walked == steps
