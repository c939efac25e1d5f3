"""SOURCE with the order of batches averaged out: the paper's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tda_lightning.curvature import Spectrum, as_matrices
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.estimators.queries import Response, directions, dot
from tda_lightning.estimators.source.schedule import chunks
from tda_lightning.estimators.source.segments import (
    Adjoint,
    Crossing,
    FittedSegment,
    examples_as_queries,
    restricted_to_rows,
)
from tda_lightning.estimators.source.spectral import combined


def cross(
    segments: Sequence[FittedSegment], number: int, adjoint: Adjoint, first_query: int
) -> Crossing:
    """Score a segment's checkpoints and carry the adjoint of the queries to its start."""
    segment = segments[number]
    inside = {name: segment.enter(name, own) for name, own in adjoint.items()}
    responses = segment_responses(segment, inside)
    crossing = segment.crossing(adjoint, inside)
    del inside
    score(segment, responses, first_query)
    return crossing


def score(segment: FittedSegment, responses: Mapping[str, Response], first_query: int) -> None:
    """Score the examples at a segment's checkpoints, given what the queries ask of them."""
    session, steps, number = segment.session, segment.steps.checkpoints, segment.number
    tokens = directions(session, responses) if session.by_token else {}
    for step in steps:
        for batch in session.walk_columns(f"{segment.title}: scores, step {step}", step):
            gradients = segment.units(batch.gradients) if WHOLE in responses else batch.gradients
            values = dot(responses, gradients)
            share = 1 / (session.num_train * len(steps))
            session.add(number, batch, values * share, first_query, used=segment.used)
            if session.by_token:
                session.add_terms(batch, tokens, first_query, share, segment.used)


def segment_responses(segment: FittedSegment, inside: Adjoint) -> dict[str, Response]:
    """What the queries ask of the segment's examples: by unit of curvature, or by block where the
    unit of leading directions takes all blocks together."""
    meetings = segment.session.num_train * len(segment.steps.checkpoints)
    responses: dict[str, Response] = {}
    for name, adjoint in inside.items():
        spectrum = segment.spectra[name]
        response = combined(segment.transfers[name].response, adjoint)
        if name in segment.geometry.scale:
            by_unit = {name: segment.response(name, adjoint)}
            if name == WHOLE:
                by_unit = as_matrices(segment.session.blocks, by_unit[name][..., 0, 0, :])
            responses |= {unit: Response(own, None, meetings) for unit, own in by_unit.items()}
        elif isinstance(spectrum, Spectrum):
            responses[name] = Response(response, spectrum, meetings)
        else:
            leading, by_block = spectrum.by_block(response)
            spectrum.inflate(leading, by_block)
            for block, own in by_block.items():
                responses[block] = Response(own, spectrum.spectra[block], meetings)
    return responses


def add_self_influence(segments: Sequence[FittedSegment]) -> None:
    """Score each example as its own query: its measurement is carried back through all segments."""
    session, last = segments[-1].session, segments[-1]
    for batch in session.walk("self-influence"):
        near, measured = restricted_to_rows(segments, last.measurement_gradients(batch))
        trained = {
            step: segment.gradients(batch, step)
            for segment in near
            for step in segment.steps.checkpoints
        }
        for name, gradient in measured.items():
            for part in chunks(slice(0, len(batch.examples)), gradient.cost_per_example):
                examples = batch.examples[part]
                values = torch.zeros(len(examples), dtype=session.dtype, device=session.device)
                for segment, adjoint in examples_as_queries(near, name, gradient, part):
                    response = combined(segment.transfers[name].response, adjoint)
                    for step in segment.steps.checkpoints:
                        own = segment.coordinates(name, trained[step][name], part)
                        products = (response * own).flatten(1).sum(1)
                        if (weights := batch.weights(segment.used)) is not None:
                            products = products * weights[part]
                        values += products / len(segment.steps.checkpoints)
                session.add_self_influence(examples, values / session.num_train)
