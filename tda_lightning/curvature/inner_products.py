"""Inner products of the gradients of a sample, of every two examples once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tda_lightning.curvature.sampled import Drawn, Sample
from tda_lightning.gradients import Gradient, Outer, Rows
from tda_lightning.session.queries import QueryGradients

_STRIP_SCALARS = 1 << 25  # of dense gradients that meet all later ones


def inner_products(sample: Sample, title: str, rows: Sequence[Drawn]) -> Tensor:
    """G G^T of the gradients g sqrt(weight / m) of ``sample``, which ``rows`` holds: float64
    [example, example]."""
    session, places = sample.session, places_of(rows)
    roots = torch.cat([row.roots for row in rows]).double()
    total = torch.zeros(len(roots), len(roots), dtype=torch.float64, device=roots.device)
    strips = [
        (name, first, first + together)
        for name, gradient in rows[0].gradients.items()
        for together in [_together(gradient)]
        for first in range(0, len(rows), together)
    ]
    # A dry run has few of the batches, and each of them meets few others.
    count = len(strips) * (sample.batches // len(rows)) ** 2
    room = sample.held * session.dtype.itemsize
    for name, first, end in session.loop(title, strips, count, room):
        queries = QueryGradients({name: [row.gradients[name] for row in rows[first:end]]})
        own = slice(places[first].start, places[min(end, len(rows)) - 1].stop)
        for later in range(first, len(rows)):
            total[own, places[later]] += queries.dot({name: rows[later].gradients[name]}).double()
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


def places_of(rows: Sequence[Drawn]) -> list[slice]:
    """Where the examples of each batch stand among all."""
    ends = torch.tensor([len(row.roots) for row in rows]).cumsum(0).tolist()
    return [slice(end - len(row.roots), end) for end, row in zip(ends, rows, strict=True)]


def _together(gradient: Gradient) -> int:
    """Batches that meet the later ones together: where they are dense these are made anew for each
    strip."""
    size = math.prod(gradient.shape[1:])
    if pair_cost(gradient) < size:
        return 1
    return max(1, _STRIP_SCALARS // (size * gradient.batch))
