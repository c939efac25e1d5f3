"""Finds the leading coordinates of an index, from a sample of examples and of queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_lightning.gradients import Gradient
from tda_lightning.gradients.basis import matmul_sides
from tda_lightning.index.directions import (
    Grid,
    Grids,
    LeadingCoordinates,
    gradient_coordinates,
    response_coordinates,
)
from tda_lightning.index.responses import Responder, Responses
from tda_lightning.index.sides import Side, balanced, sketch
from tda_lightning.session.session import Session

# Coordinates that compete for their place, and that principal components are taken of. More of
# either costs time in proportion, and memory times the sample.
GRID, MIXED = 16384, 4096
_FLOOR = 1e-6  # of the largest component: smaller ones are noise of the sample


@dataclass(frozen=True)
class Samples:
    """What coordinates are chosen by.

    Attributes:
        examples: training examples, as batches of indices.
        mixing: principal components are taken over these; more than ``examples``.
    """

    examples: Sequence[Sequence[int]]
    mixing: Sequence[Sequence[int]]


def fit_directions(
    session: Session, responder: Responder, width: int, samples: Samples, seed: int
) -> LeadingCoordinates:
    """The best ``width`` coordinates for the responses of the session's queries and the gradients
    of the sample; all of them, on the parameters' own axes, where there are no more."""
    count = len(responder.terms)
    sizes = {block.name: block.size for block in session.blocks}
    if width >= count * sum(sizes.values()):
        axes = [{name: _axes(session, size) for name, size in sizes.items()}] * count
        ones = torch.ones(count * sum(sizes.values()), dtype=session.dtype, device=session.device)
        return LeadingCoordinates(axes, ones, ones)
    sides = _sides(session, responder, samples.examples, seed)
    grids = _grids(session, sides, max(GRID, width))
    gradients = _gradient_rows(session, responder, grids, samples.mixing)
    responses = _response_rows(session, responder, grids)
    return _mixed(grids, gradients, responses, width)


def _axes(session: Session, size: int) -> Grid:
    return Grid((None, None), (None, None), torch.arange(size, device=session.device))


# The two sides of every block in every term.

Moments = dict[str, tuple[Tensor, Tensor]]
Sides = list[dict[str, tuple[Side, Side]]]


def _sides(
    session: Session, responder: Responder, sample: Sequence[Sequence[int]], seed: int
) -> Sides:
    generator = torch.Generator().manual_seed(seed)
    sketches = {}
    for block in session.blocks:
        groups, rows, columns = block.shape
        own = (sketch(groups, width, generator) for width in (rows, columns))
        left, right = (
            None if one is None else one.to(session.device, session.dtype) for one in own
        )
        sketches[block.name] = (left, right)
    examples = [_Moments(sketches) for _ in responder.terms]
    asked = [_Moments(sketches) for _ in responder.terms]
    for number, gradients in _gradients(session, responder, sample):
        examples[number].add_gradients(gradients)
    for number, responses in _responses(session, responder):
        asked[number].add_responses(responses)
    return [
        {
            name: (
                balanced(own.left(name), queries.left(name), sketches[name][0]),
                balanced(own.right(name), queries.right(name), sketches[name][1]),
            )
            for name in sketches
        }
        for own, queries in zip(examples, asked, strict=True)
    ]


class _Moments:
    """Mean second moments of both sides of matrices [*, groups, rows, columns], by block."""

    def __init__(self, sketches: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> None:
        self.sketches = sketches
        self.sums: Moments = {}
        self.count: dict[str, int] = {}

    def add_gradients(self, gradients: Mapping[str, Gradient]) -> None:
        for name, gradient in gradients.items():
            for rows in gradient.chunks():
                self._add(name, gradient.rotated(rows, *self.sketches[name]))

    def add_responses(self, responses: Responses) -> None:
        for name, own in responses.items():
            left, right = self.sketches[name]
            self._add(name, matmul_sides(left, own, right))

    def left(self, name: str) -> Tensor:
        return self.sums[name][0] / self.count[name]

    def right(self, name: str) -> Tensor:
        return self.sums[name][1] / self.count[name]

    def _add(self, name: str, matrices: Tensor) -> None:
        across = matrices.transpose(0, 1)  # [groups, *, rows, columns]
        tall, wide = across.flatten(1, 2), across.mT.flatten(1, 2)
        left, right = (wide.mT @ wide).double(), (tall.mT @ tall).double()
        if name in self.sums:
            left, right = left + self.sums[name][0], right + self.sums[name][1]
        self.sums[name] = (left, right)
        self.count[name] = self.count.get(name, 0) + len(matrices)


def _grids(session: Session, sides: Sides, room: int) -> Grids:
    """The coordinates that matter most, as far as the sides can tell: of direction i on the left
    and j on the right, S_i^2 S_j^2 over the two factors' mean squares."""
    shares: list[Tensor] = []
    for own in sides:
        for left, right in own.values():
            product = left.shares[:, :, None] * right.shares[:, None, :]
            shares.append(product / left.energy.clamp(min=1e-300)[:, None, None])
    sizes = [share.numel() for share in shares]
    flat = torch.cat([share.flatten() for share in shares])
    best = torch.zeros_like(flat, dtype=torch.bool)
    best[flat.topk(min(room, len(flat))).indices] = True
    grids: list[dict[str, Grid]] = []
    masks = iter(
        mask.unflatten(0, share.shape)
        for mask, share in zip(best.split(sizes), shares, strict=True)
    )
    for own in sides:
        found = {}
        for name, (left, right) in own.items():
            mask = next(masks)
            if not bool(mask.any()):
                continue
            _, rows, columns = mask.nonzero(as_tuple=True)
            left, right = left.first(int(rows.max()) + 1), right.first(int(columns.max()) + 1)
            mask = mask[:, : int(rows.max()) + 1, : int(columns.max()) + 1]
            kept = mask.flatten().nonzero().squeeze(1)
            place = (session.device, session.dtype)
            found[name] = Grid(
                (left.examples.to(*place), right.examples.to(*place)),
                (left.responses.to(*place), right.responses.to(*place)),
                kept.to(session.device),
            )
        grids.append(found)
    return grids


# What examples and queries have in these coordinates.


def _gradient_rows(
    session: Session, responder: Responder, grids: Grids, sample: Sequence[Sequence[int]]
) -> Tensor:
    """Coordinates of the sample's gradients, averaged over each term's checkpoints: [example,
    coordinate]."""
    by_term: list[list[Tensor]] = [[] for _ in grids]
    for number, gradients in _gradients(session, responder, sample):
        by_term[number].append(gradient_coordinates(grids[number], gradients))
    parts = []
    for term, own in zip(responder.terms, by_term, strict=True):
        batches = len(own) // len(term.steps)
        steps = [torch.cat(own[n * batches : (n + 1) * batches]) for n in range(len(term.steps))]
        parts.append(torch.stack(steps).mean(0))
    return torch.cat(parts, dim=1)


def _response_rows(session: Session, responder: Responder, grids: Grids) -> Tensor:
    """Coordinates of the queries' responses: [query, coordinate]."""
    by_term: list[list[Tensor]] = [[] for _ in grids]
    for number, responses in _responses(session, responder):
        by_term[number].append(response_coordinates(grids[number], responses))
    return torch.cat([torch.cat(own) for own in by_term], dim=1)


def _gradients(
    session: Session, responder: Responder, sample: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Mapping[str, Gradient]]]:
    """The number of each term with gradients of a batch of the sample, checkpoint by checkpoint."""
    for number, term in enumerate(responder.terms):
        for step in term.steps:
            session.load(step)
            for batch, examples in session.batches(sample):
                yield number, session.train_gradients(batch, examples).blocks


def _responses(session: Session, responder: Responder) -> Iterator[tuple[int, Responses]]:
    for first, last in session.query_rounds(responder.query_bytes):
        yield from responder.responses(first, last)


def _mixed(grids: Grids, gradients: Tensor, responses: Tensor, width: int) -> LeadingCoordinates:
    """The principal components of ``gradients`` [example, coordinate], weighed by ``responses``
    [query, coordinate]."""
    asked = responses.double().square().mean(0)
    offered = gradients.double().square().mean(0)
    shares = asked * offered
    room = max(MIXED, width)
    if len(shares) > room:
        best = torch.zeros_like(shares, dtype=torch.bool)
        best[shares.topk(room).indices] = True
        grids, gradients = _chosen(grids, best), gradients[:, best]
        asked, offered = asked[best], offered[best]
    if width >= len(asked):  # each by itself
        scale = _positive(offered).rsqrt()
        return LeadingCoordinates(grids, scale.to(gradients), scale.reciprocal().to(gradients))
    asked = _positive(asked).sqrt()
    weighed = gradients.double() * asked
    vectors, values = _principal(weighed, width)
    values = values.clamp(min=_FLOOR * values.max()).sqrt()
    return LeadingCoordinates(
        grids,
        (asked[:, None] * vectors / values).to(gradients),
        (vectors * values / asked[:, None]).to(gradients),
    )


def _principal(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors [coordinate, count] of the second moment, and their eigenvalues."""
    if len(rows) < rows.shape[1]:
        values, left = torch.linalg.eigh(rows @ rows.mT / len(rows))
        values, left = values.flip(0)[:count].clamp(min=0), left.flip(1)[:, :count]
        scale = (values * len(rows)).clamp(min=1e-300).rsqrt()
        return rows.mT @ left * scale, values
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
    return vectors.flip(1)[:, :count], values.flip(0)[:count].clamp(min=0)


def _positive(squares: Tensor) -> Tensor:
    """Mean squares, of which none is zero."""
    return squares.clamp(min=1e-12 * float(squares.max().clamp(min=1e-300)))


def _chosen(grids: Grids, best: Tensor) -> Grids:
    """The grids with some of their coordinates alone."""
    chosen, before = [], 0
    for own in grids:
        found = {}
        for name, grid in own.items():
            mask = best[before : before + len(grid.kept)]
            before += len(grid.kept)
            if bool(mask.any()):
                found[name] = replace(grid, kept=grid.kept[mask])
        chosen.append(found)
    return chosen
