"""The recorded batches of a segment, cut into loads that a walk can read backwards or forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_lightning.gradients.forms import CHUNK_SCALARS
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Segment, Trajectory


@dataclass(frozen=True)
class Load:
    """Uses of examples in one or several whole or partial steps between two adjacent checkpoints.

    Attributes:
        examples: data-set indices, [load].
        rows: the step (row of the table) that used each, in the order of the walk.
        shares: the weight of each example's loss in its step's loss.
        interval: the last checkpoint at or before these steps (the second again when there is
            none), and the first after them.
        place: of the load in the table of batches, where it is one recorded batch.
    """

    examples: list[int]
    rows: Tensor
    shares: Tensor
    interval: tuple[int, int]
    place: int | None = None

    def gradients(self, ends: Sequence[Tensor], rows: slice) -> Tensor:
        """Shares of the gradients of the examples in ``rows`` at their own steps, interpolated
        between those at the two checkpoints: [chunk, groups, rows, columns] each."""
        (before, after), (start, stop) = ends, self.interval
        between = (self.rows[rows] - start).double() / max(stop - start, 1)
        between, shares = (n.to(before)[:, None, None, None] for n in (between, self.shares[rows]))
        return shares * torch.lerp(before, after, between)

    def by_step(self) -> list[Load]:
        """The load cut into those of single steps."""
        return [
            replace(
                self,
                examples=self.examples[part],
                rows=self.rows[part],
                shares=self.shares[part],
            )
            for _, part in self.runs()
        ]

    def end_shares(self) -> tuple[Tensor, Tensor]:
        """What the gradients at the two checkpoints around the steps count by, [load] each."""
        start, stop = self.interval
        after = self.shares * (self.rows - start).double() / max(stop - start, 1)
        return self.shares - after, after

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Each step with the positions of its examples."""
        rows, counts = torch.unique_consecutive(self.rows, return_counts=True)
        start = 0
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            yield row, slice(start, start + count)
            start += count


def recorded_loads(
    trajectory: Trajectory,
    segment: Segment,
    size: int,
    share: Callable[[int], float],
    read: Callable[[int], list[int]] = lambda example: [example],
) -> list[Load]:
    """The segment's uses of examples, last step first, in loads of up to ``size``.

    A load does not cross a checkpoint. ``share`` gives the weight of an example's loss in the loss
    of a batch of so many (``AttributionTask.share``), ``read`` what is read for a use of an
    example.

    Raises:
        UnsupportedTrainingError: the run has no example indices (an iterable data set).
    """
    if not len(trajectory.steps.examples):
        raise UnsupportedTrainingError(
            "order='recorded' follows the recorded batches, and this run has no example indices: "
            "its data set is iterable. Use order='average'."
        )
    uses: dict[tuple[int, int], list[tuple[int, int, float]]] = {}
    for row in reversed(range(segment.start, segment.stop)):
        between = uses.setdefault(interval_around(trajectory, row), [])
        divisor = int(trajectory.steps.accumulation[row])
        for batch in trajectory.steps.batches(row):
            own = share(len(batch)) / divisor
            between += [(place, row, own) for index in batch.tolist() for place in read(index)]
    loads = []
    for interval, between in uses.items():
        for first in range(0, len(between), size):
            examples, rows, shares = zip(*between[first : first + size], strict=True)
            weights = torch.tensor(shares, dtype=torch.float64)
            loads.append(Load(list(examples), torch.tensor(rows), weights, interval))
    return loads


def recorded_batches(
    trajectory: Trajectory, segment: Segment, share: Callable[[int], float]
) -> list[Load]:
    """The segment's recorded batches, last step first, each as a load of its own: for losses that
    draw what they drew in training. See :func:`recorded_loads`."""
    steps, loads = trajectory.steps, []
    for row in reversed(range(segment.start, segment.stop)):
        interval, divisor = interval_around(trajectory, row), int(steps.accumulation[row])
        for place, batch in enumerate(steps.batches(row), start=int(steps.batch_offsets[row])):
            rows = torch.full((len(batch),), row)
            shares = torch.full((len(batch),), share(len(batch)) / divisor, dtype=torch.float64)
            loads.append(Load(batch.tolist(), rows, shares, interval, place))
    return loads


def interval_around(trajectory: Trajectory, row: int) -> tuple[int, int]:
    """The recorded checkpoints around the weights that row ``row`` started from."""
    after = min(step for step in trajectory.checkpoints if step > row)
    return max((step for step in trajectory.checkpoints if step <= row), default=after), after


def chunks(rows: slice, scalars_per_example: int) -> Iterator[slice]:
    """Parts of ``rows`` that are small enough to be held dense."""
    size = max(1, CHUNK_SCALARS // scalars_per_example)
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))
