"""How much of a run's steps each training example was, counted from the recorded batches.

A sampler may draw an example often or never, and a run may end in the middle of an epoch.
Estimators that average the order of batches out count an example by how often it was drawn in the
steps that they stand for (docs/methods.md, "Uneven use").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tda_lightning.records.trajectory import Steps, Trajectory

_ROUNDING = 1e-9


def draw_counts(trajectory: Trajectory, num_train: int) -> Tensor | None:
    """How often the run drew each training example before its last checkpoint, int64 [train];
    None where it recorded no example indices."""
    steps = trajectory.steps
    if not len(steps.examples):
        return None
    drawn = steps.examples[: _first_example(steps, trajectory.last_step)]
    return torch.bincount(drawn, minlength=num_train)


def example_weights(
    trajectory: Trajectory,
    start: int,
    stop: int,
    num_train: int,
    share: Callable[[int], float],
) -> Tensor | None:
    r"""The weight of each training example in the mean loss that steps ``start`` < t <= ``stop``
    descended; their mean is 1:

    .. math::
        v_n = N \sum_e \frac{k_e}K \frac{c_{en}}{\sum_i c_{ei}}

    with k_e of the K steps in epoch e, which drew example n c_en times. The order within an epoch
    is averaged out: what it drew counts as spread over all of its steps, so a span that cuts it has
    a part of all. Where batches have unequal sizes and every epoch the same ones, that is no matter
    of order: an example in a smaller batch has a larger share in its step each time, and c is the
    sum of its shares.

    Args:
        share: the weight of an example's loss in the loss of a batch of so many
            (``AttributionTask.share``).

    Returns:
        float64 [train]. None where all are 1, and where the run recorded no example indices.
    """
    steps = trajectory.steps
    if not len(steps.examples):
        return None
    epochs = list(_epochs(steps.epoch[: trajectory.last_step]))
    by_share = _repeats(steps, epochs, num_train, share)
    weights = torch.zeros(num_train, dtype=torch.float64)
    for first, last in epochs:
        inside = min(last, stop) - max(first, start)
        if inside > 0:
            uses = _uses(steps, first, last, num_train, share if by_share else None)
            weights += uses / uses.sum() * (inside / (stop - start) * num_train)
    return None if bool(((weights - 1).abs() < _ROUNDING).all()) else weights


def _repeats(
    steps: Steps,
    epochs: Sequence[tuple[int, int]],
    num_train: int,
    share: Callable[[int], float],
) -> bool:
    """Whether every epoch gave each example the same share; the last one may have been cut."""
    (first, last), *others = epochs
    if others and others[-1][1] - others[-1][0] < last - first:
        others = others[:-1]
    own = _uses(steps, first, last, num_train, share)
    return bool(others) and all(
        torch.equal(own, _uses(steps, *other, num_train, share)) for other in others
    )


def _epochs(epoch: Tensor) -> Iterator[tuple[int, int]]:
    """The rows of each epoch, from the first to past the last."""
    start = 0
    for rows in torch.unique_consecutive(epoch, return_counts=True)[1].tolist():
        yield start, start + rows
        start += rows


def _uses(
    steps: Steps, first: int, last: int, num_train: int, share: Callable[[int], float] | None
) -> Tensor:
    """How often rows ``first`` to ``last`` drew each example, or the sum of its shares in their
    losses, float64 [train]."""
    offsets = steps.batch_offsets[first : last + 1]
    batches = steps.example_offsets[int(offsets[0]) : int(offsets[-1]) + 1]
    drawn = steps.examples[int(batches[0]) : int(batches[-1])]
    if share is None:
        return torch.bincount(drawn, minlength=num_train).double()
    sizes = batches.diff()
    divisors = steps.accumulation[first:last].repeat_interleave(offsets.diff())
    kinds, kind = sizes.unique(return_inverse=True)
    own = [share(size) if size else 0.0 for size in kinds.tolist()]
    by_batch = torch.tensor(own, dtype=torch.float64)[kind] / divisors
    weights = by_batch.repeat_interleave(sizes)
    return torch.bincount(drawn, weights=weights, minlength=num_train)


def _first_example(steps: Steps, row: int) -> int:
    """Position among all examples of the first that row ``row`` used."""
    return int(steps.example_offsets[int(steps.batch_offsets[row])])
