"""The order of forward and reverse sweeps over a stretch of steps, so that its states fit in RAM.

Reverse-mode differentiation needs the states of the steps in reverse. A stretch whose states do not
all fit is cut into pieces: one sweep takes a snapshot at each cut, and then every piece, the last
one first, is replayed from its snapshot with all states kept. A piece that is still too long is
cut again (Griewank & Walther, "Evaluating Derivatives", 2nd ed., 2008, ch. 12: checkpointing
schedules). A replay repeats the same arithmetic, so the result does not depend on the cuts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Sweep:
    """A walk over the rows ``start`` to ``stop`` of the steps table.

    Attributes:
        kind: ``advance``: forwards, with snapshots at ``cuts``; ``record``: forwards, keeping every
            step's state; ``reverse``: backwards through the states that were kept.
        cuts: rows before which a snapshot is taken.
    """

    kind: str
    start: int
    stop: int
    cuts: tuple[int, ...] = ()

    def rows(self) -> range:
        """The rows in the order of the sweep."""
        rows = range(self.start, self.stop)
        return rows[::-1] if self.kind == "reverse" else rows


def least_budget(steps: int, state: int, snapshot: int) -> int:
    """Bytes that an interval of so many steps can be walked back with: cut in two again and again,
    a snapshot for each time."""
    return state + (steps - 1).bit_length() * snapshot


def plan_sweeps(start: int, stop: int, budget: int, state: int, snapshot: int) -> Iterator[Sweep]:
    """Sweeps over rows ``start`` to ``stop`` that hold at most ``budget`` bytes of states.

    Args:
        budget: bytes; at least :func:`least_budget`.
        state: bytes of one step's kept state.
        snapshot: bytes of what a walk goes on from.
    """
    steps = stop - start
    if steps * state <= budget or steps == 1:
        yield Sweep("record", start, stop)
        yield Sweep("reverse", start, stop)
        return
    pieces = _pieces(steps, budget, state, snapshot)
    bounds = [start + number * steps // pieces for number in range(pieces + 1)]
    yield Sweep("advance", start, bounds[-2], tuple(bounds[1:-1]))
    # A piece that is done gives up its snapshot: the earlier ones have the more room.
    for number in reversed(range(pieces)):
        room = budget - number * snapshot
        yield from plan_sweeps(bounds[number], bounds[number + 1], room, state, snapshot)


def _pieces(steps: int, budget: int, state: int, snapshot: int) -> int:
    """The fewest pieces whose states fit beside the snapshots; where there is no such number,
    as many as leave enough for cutting them again."""
    for pieces in range(2, steps + 1):
        taken = (pieces - 1) * snapshot
        if taken + -(-steps // pieces) * state <= budget:
            return pieces
        if taken > budget:
            break
    pieces = 2
    while pieces < steps:
        longest = -(-steps // (pieces + 1))
        if pieces * snapshot + least_budget(longest, state, snapshot) > budget:
            break
        pieces += 1
    return pieces
