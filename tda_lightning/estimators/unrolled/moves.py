"""In which order an interval is walked forwards and backwards, so that its states fit in memory.

Reverse-mode differentiation needs the states of the steps in reverse. Where not all of an interval
fit, it is cut into pieces: one walk keeps a standstill at each cut, and then every piece, the last
one first, is walked again from its standstill with all states kept. A piece that is still too long
is cut again (Griewank & Walther, "Evaluating Derivatives", 2nd ed., 2008, ch. 12: checkpointing
schedules). A replay repeats the same arithmetic, so the result does not depend on the cuts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """A walk over the rows ``start`` to ``stop`` of the steps table.

    Attributes:
        kind: ``skip``: forwards, keeping standstills at ``cuts``; ``keep``: forwards, keeping every
            step's state; ``back``: backwards through the states that were kept.
        cuts: rows before which a standstill is kept.
    """

    kind: str
    start: int
    stop: int
    cuts: tuple[int, ...] = ()

    def rows(self) -> range:
        """The rows in the order of the walk."""
        rows = range(self.start, self.stop)
        return rows[::-1] if self.kind == "back" else rows


def least_budget(steps: int, state: int, standstill: int) -> int:
    """Bytes that an interval of so many steps can be walked back with: cut in two again and again,
    a standstill for each time."""
    return state + (steps - 1).bit_length() * standstill


def plan_moves(start: int, stop: int, budget: int, state: int, standstill: int) -> Iterator[Move]:
    """Moves through rows ``start`` to ``stop`` that hold at most ``budget`` bytes of states.

    Args:
        budget: bytes; at least :func:`least_budget`.
        state: bytes of one step's kept state.
        standstill: bytes of what a walk goes on from.
    """
    steps = stop - start
    if steps * state <= budget or steps == 1:
        yield Move("keep", start, stop)
        yield Move("back", start, stop)
        return
    pieces = _pieces(steps, budget, state, standstill)
    bounds = [start + number * steps // pieces for number in range(pieces + 1)]
    yield Move("skip", start, bounds[-2], tuple(bounds[1:-1]))
    # A piece that is done gives up its standstill: the earlier ones have the more room.
    for number in reversed(range(pieces)):
        room = budget - number * standstill
        yield from plan_moves(bounds[number], bounds[number + 1], room, state, standstill)


def _pieces(steps: int, budget: int, state: int, standstill: int) -> int:
    """The fewest pieces whose states fit beside the standstills; where there is no such number,
    as many as leave enough for cutting them again."""
    for pieces in range(2, steps + 1):
        taken = (pieces - 1) * standstill
        if taken + -(-steps // pieces) * state <= budget:
            return pieces
        if taken > budget:
            break
    pieces = 2
    while pieces < steps:
        longest = -(-steps // (pieces + 1))
        if pieces * standstill + least_budget(longest, state, standstill) > budget:
            break
        pieces += 1
    return pieces
