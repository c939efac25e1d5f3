"""Queries on their way back through one stage whose optimizer has no metric, with the order of
batches averaged out: they stay in the bases of the segments, block by block.

Measurement gradients are turned by their factors, and from one segment's basis to the next in one
product for each side. Where a metric scales the gradients, or other stages are involved, adjoints
go by way of the parameters (``averaged.py``); the result is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.curvature import DeflatedSpectrum, Spectrum, units
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.estimators.queries import Response
from tda_lightning.estimators.source.averaged import score
from tda_lightning.estimators.source.segments import (
    FittedSegment,
    restricted_to_rows,
    with_components,
)
from tda_lightning.estimators.source.spectral import combined
from tda_lightning.gradients import Gradient
from tda_lightning.gradients.forms import CHUNK_SCALARS
from tda_lightning.runtime.full_precision import full_precision
from tda_lightning.session.session import Batch, Session, memory_budget

_COPIES = 4  # of its gradient, that an example takes where it is scored for itself
# Such examples at least: each part of them reads all leading directions six times a segment.
_TOGETHER = 32


@dataclass(frozen=True)
class _Inside:
    """Adjoints at a segment's end in its eigenbasis, each with its components and queries in front.

    Attributes:
        leading: coordinates along leading directions, [component, query, count]; None without.
        rest: what these leave, in the basis of each block.
    """

    leading: Tensor | None
    rest: dict[str, Tensor]


def stays_in_bases(segments: Sequence[FittedSegment]) -> bool:
    """Whether no segment scales gradients by a metric."""
    return not any(segment.geometry.scale for segment in segments)


def follow(segments: Sequence[FittedSegment], first: int, last: int) -> None:
    """Score the examples of all segments, the last one first, for the queries ``first`` to
    ``last``."""
    segment = segments[-1]
    adjoint = _measured(segment, first, last)
    for number in reversed(range(len(segments))):
        segment = segments[number]
        inside = _entered(segment, adjoint)
        responses = _responses(segment, inside)
        # The query's own part is not needed any more when the first segment is scored.
        adjoint = _left(segment, inside, segments[number - 1]) if number else {}
        del inside
        score(segment, responses, first)


def add_self_influence(segments: Sequence[FittedSegment]) -> None:
    """Score each example as its own query: its measurement is carried back through all segments."""
    session = segments[-1].session
    for batch in session.walk("self-influence"):
        session.load(session.trajectory.last_step)
        gradients = session.measurement_gradients(batch.data, batch.examples).blocks
        near, measured = restricted_to_rows(segments, gradients)
        trained: dict[int, dict[str, Gradient]] = {}
        for segment in near:
            for step in segment.steps.checkpoints:
                session.load(step)
                own = segment.session.train_gradients(batch.data, batch.examples, batch.noise)
                trained[step] = own.blocks
        bytes_each = near[-1].session.gradient_bytes(_COPIES * near[-1].components)
        together = max(_TOGETHER, CHUNK_SCALARS // near[-1].session.num_parameters)
        size = max(1, min(together, memory_budget() // bytes_each))
        for start in range(0, len(batch.examples), size):
            part = slice(start, min(start + size, len(batch.examples)))
            values = _own_scores(near, batch, measured, trained, part)
            session.add_self_influence(batch.examples[part], values / session.num_train)


def _own_scores(
    segments: Sequence[FittedSegment],
    batch: Batch,
    measured: Mapping[str, Gradient],
    trained: Mapping[int, Mapping[str, Gradient]],
    part: slice,
) -> Tensor:
    """What some examples of a batch do to their own measurements, times N: [example]."""
    session, last = segments[-1].session, segments[-1]
    values = torch.zeros(part.stop - part.start, dtype=session.dtype, device=session.device)
    there = _coordinates(last, measured, part)
    adjoint = {name: with_components(own[None], last.components) for name, own in there.items()}
    for number in reversed(range(len(segments))):
        segment = segments[number]
        inside = _entered(segment, adjoint)
        response = _inside_responses(segment, inside)
        adjoint = _left(segment, inside, segments[number - 1]) if number else {}
        del inside
        steps = segment.steps.checkpoints
        weights = batch.weights(segment.used)
        for step in steps:
            own = _coordinates(segment, trained[step], part)
            products = sum((response[n] * own[n]).flatten(1).sum(1) for n in own)
            values += (products if weights is None else products * weights[part]) / len(steps)
    return values


def _coordinates(
    segment: FittedSegment, gradients: Mapping[str, Gradient], rows: slice
) -> dict[str, Tensor]:
    """Gradients of some examples by block in the segment's bases, [example, groups, rows,
    columns]."""
    bases = _bases(segment)
    kind = "exact" if WHOLE in bases else "blocks"
    return {n: bases[n].coordinates(own, rows) for n, own in units(kind, gradients).items()}


def _bases(segment: FittedSegment) -> dict[str, Spectrum]:
    """The basis of each unit in which adjoints are held."""
    whole = segment.spectra.get(WHOLE)
    if isinstance(whole, DeflatedSpectrum):
        return whole.spectra
    return {name: own for name, own in segment.spectra.items() if isinstance(own, Spectrum)}


def _measured(segment: FittedSegment, first: int, last: int) -> dict[str, Tensor]:
    """Measurement gradients of the queries by the final model, in the segment's bases: [component,
    query, groups, rows, columns]."""
    session, bases = segment.session, _bases(segment)
    kind = "exact" if WHOLE in bases else "blocks"
    session.load(session.trajectory.last_step)
    out: dict[str, Tensor] = {}
    start = 0
    for batch, examples in session.queries(first, last):
        found = session.measurement_gradients(batch, examples)
        for name, gradient in units(kind, found.blocks).items():
            if name not in out:
                out[name] = _empty(session, last - first, gradient.shape[1:])
            for rows in gradient.chunks():
                place = slice(start + rows.start, start + rows.stop)
                out[name][place] = bases[name].coordinates(gradient, rows)
        start += len(examples)
    return {name: with_components(own[None], segment.components) for name, own in out.items()}


def _empty(session: Session, count: int, shape: Sequence[int]) -> Tensor:
    return torch.empty(count, *shape, dtype=session.dtype, device=session.device)


@full_precision
def _entered(segment: FittedSegment, adjoint: dict[str, Tensor]) -> _Inside:
    """An adjoint in the blocks' bases, in the eigenbasis of the segment: in place."""
    whole = segment.spectra.get(WHOLE)
    if not isinstance(whole, DeflatedSpectrum):
        return _Inside(None, adjoint)
    return _Inside(whole.deflate(adjoint), adjoint)


def _applied(segment: FittedSegment, coefficients: Tensor, inside: _Inside) -> dict[str, Tensor]:
    """Coefficients of some components [component, *eigenvalues] times an adjoint, in the blocks'
    bases: [query, groups, rows, columns]."""
    whole = segment.spectra[WHOLE]
    assert isinstance(whole, DeflatedSpectrum) and inside.leading is not None
    along, own = whole.by_block(coefficients)
    out = {name: combined(own[name], rest) for name, rest in inside.rest.items()}
    whole.inflate(combined(along, inside.leading), out)
    return out


def _responses(segment: FittedSegment, inside: _Inside) -> dict[str, Response]:
    """What the queries ask of the segment's examples, by unit."""
    meetings = segment.session.num_train * len(segment.steps.checkpoints)
    values, bases = _inside_responses(segment, inside), _bases(segment)
    return {name: Response(own, bases[name], meetings) for name, own in values.items()}


@full_precision
def _inside_responses(segment: FittedSegment, inside: _Inside) -> dict[str, Tensor]:
    """The same in the segment's bases, [query, groups, rows, columns]."""
    if inside.leading is not None:
        return _applied(segment, segment.transfers[WHOLE].response, inside)
    return {
        name: combined(segment.transfers[name].response, rest) for name, rest in inside.rest.items()
    }


@full_precision
def _left(segment: FittedSegment, inside: _Inside, before: FittedSegment) -> dict[str, Tensor]:
    """The adjoint at the segment's start, in the bases of the segment before it."""
    if inside.leading is not None:
        carry = segment.transfers[WHOLE].carry
        components = [_applied(segment, own, inside) for own in carry]
    else:
        transfers, rests = segment.transfers, inside.rest.items()
        components = [
            {name: combined(transfers[name].carry[number], rest) for name, rest in rests}
            for number in range(segment.components)
        ]
    carried = {name: _stacked([own[name] for own in components]) for name in components[0]}
    bases, others = _bases(segment), _bases(before)
    return {name: others[name].project_from(bases[name], own) for name, own in carried.items()}


def _stacked(components: Sequence[Tensor]) -> Tensor:
    return components[0][None] if len(components) == 1 else torch.stack(list(components))
