"""Inner products of the gradients of a sample, of every two examples once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tda_lightning.curvature.sampled import Row, Sample
from tda_lightning.gradients import Gradient, Outer, Rows
from tda_lightning.session.queries import QueryGradients

_STRIP_SCALARS = 1 << 27  # of dense gradients that meet all later ones
_TOGETHER = 256  # of them that meet those after them in one product


def inner_products(sample: Sample, title: str, rows: Sequence[Row]) -> Tensor:
    """G G^T of the gradients g sqrt(weight / m) of ``sample``, which ``rows`` holds: float64
    [example, example]."""
    session, places = sample.session, places_of(rows)
    roots = torch.cat([row.roots for row in rows]).double()
    total = torch.zeros(len(roots), len(roots), dtype=torch.float64, device=roots.device)
    most = max(len(row.roots) for row in rows)
    together = {name: _together(own, most) for name, own in rows[0].gradients.items()}
    meetings = [
        (name, *meeting)
        for name, size in together.items()
        for meeting in _meetings(len(rows), size)
    ]
    # Of the whole sample: a dry run has few of the batches.
    count = sum(
        1 + sample.batches - min(first + size, sample.batches)
        for size in together.values()
        for first in range(0, sample.batches, size)
    )
    room = sample.held * session.dtype.itemsize
    dense: Tensor | None = None
    for name, first, end, later in session.loop(title, meetings, count, room):
        start, stop = places[first].start, places[end - 1].stop
        met = rows[later].gradients[name]
        if _factored(met):
            own = QueryGradients({name: [rows[first].gradients[name]]})
            total[start:stop, places[later]] += own.dot({name: met}).double()
        elif later > first and dense is not None:
            total[start:stop, places[later]] += dense @ _dense([met]).T
        else:
            dense = _dense([row.gradients[name] for row in rows[first:end]])
            for above in range(0, len(dense), _TOGETHER):
                part = dense[above : above + _TOGETHER]
                total[start + above : start + above + len(part), start + above : stop] += (
                    part @ dense[above:].T
                )
    total = total.triu()
    return (total + total.triu(1).T) * roots[:, None] * roots


def pair_cost(gradient: Gradient) -> int:
    """Multiplications for the inner product of two examples, by their factors where cheaper."""
    _, groups, height, width = gradient.shape
    if isinstance(gradient, Rows):
        return -(-len(gradient.index) // gradient.batch) * width
    if isinstance(gradient, Outer) and gradient.gram_is_cheaper(gradient):
        return groups * gradient.positions**2 * (height + width)
    return groups * height * width


def places_of(rows: Sequence[Row]) -> list[slice]:
    """Where the examples of each batch stand among all."""
    ends = torch.tensor([len(row.roots) for row in rows]).cumsum(0).tolist()
    return [slice(end - len(row.roots), end) for end, row in zip(ends, rows, strict=True)]


def _factored(gradient: Gradient) -> bool:
    return pair_cost(gradient) < math.prod(gradient.shape[1:])


def _together(gradient: Gradient, batch: int) -> int:
    """Batches of so many examples that meet the later ones together: where they are dense these are
    made anew for each strip."""
    if _factored(gradient):
        return 1
    return max(1, _STRIP_SCALARS // (math.prod(gradient.shape[1:]) * batch))


def _meetings(batches: int, together: int) -> Iterator[tuple[int, int, int]]:
    """A strip of batches, first to end, and what it meets: itself, then each later batch."""
    for first in range(0, batches, together):
        end = min(first + together, batches)
        yield first, end, first
        for later in range(end, batches):
            yield first, end, later


def _dense(gradients: Sequence[Gradient]) -> Tensor:
    """Dense gradients of several batches, flat, column by column: [example, entry]."""
    parts: list[Tensor] = []
    for own in gradients:
        if isinstance(own, Outer):
            parts += own.columns_first()
        else:
            parts += [own.dense(rows).mT.flatten(1) for rows in own.chunks()]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
