"""The recorded batches of a segment, cut into loads that a pass can read backwards or forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Segment, Trajectory


@dataclass(frozen=True)
class Load:
    """Examples of one or several whole or partial steps between two adjacent checkpoints.

    Attributes:
        examples: data-set indices, int64 [load].
        rows: the step (row of the table) that used each, in the order of the walk.
        shares: the weight of each example's loss in its step's loss.
        before: the last checkpoint at or before these steps; ``after`` again when there is none.
        after: the first checkpoint after them.
    """

    examples: list[int]
    rows: Tensor
    shares: Tensor
    before: int
    after: int

    def interpolation(self) -> Tensor:
        """How far each example's step lies from ``before`` (0) to ``after`` (1), [load]."""
        return (self.rows - self.before).double() / max(self.after - self.before, 1)


def recorded_loads(
    trajectory: Trajectory, segment: Segment, size: int, share: Callable[[int], float]
) -> list[Load]:
    """The segment's uses of examples, last step first, in loads of up to ``size``.

    A load does not cross a checkpoint. ``share`` gives the weight of an example's loss in the loss
    of a batch of so many (``AttributionTask.share``).

    Raises:
        UnsupportedTrainingError: the run has no example indices (an iterable data set).
    """
    if not len(trajectory.steps.examples):
        raise UnsupportedTrainingError(
            "order='recorded' follows the recorded batches, and this run has no example indices: "
            "its data set is iterable. Use order='average'."
        )
    checkpoints = sorted(trajectory.checkpoints)
    loads: list[Load] = []
    uses: list[tuple[int, int, float]] = []
    interval: tuple[int, int] | None = None

    def flush() -> None:
        for first in range(0, len(uses), size):
            part = uses[first : first + size]
            assert interval is not None
            loads.append(
                Load(
                    [example for _, example, _ in part],
                    torch.tensor([row for row, _, _ in part]),
                    torch.tensor([share for _, _, share in part], dtype=torch.float64),
                    *interval,
                )
            )
        uses.clear()

    for row in reversed(range(segment.start, segment.stop)):
        around = interval_around(checkpoints, row)
        if around != interval:
            flush()
            interval = around
        divisor = int(trajectory.steps.accumulation[row])
        for batch in trajectory.steps.batches(row):
            own = share(len(batch)) / divisor
            uses += [(row, index, own) for index in batch.tolist()]
    flush()
    return loads


def interval_around(checkpoints: Sequence[int], row: int) -> tuple[int, int]:
    """The recorded checkpoints around the weights that row ``row`` started from."""
    before = [step for step in checkpoints if step <= row]
    after = [step for step in checkpoints if step > row]
    if not before:
        return after[0], after[0]
    return before[-1], after[0]
