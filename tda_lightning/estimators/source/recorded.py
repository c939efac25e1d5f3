"""SOURCE in the order of the batches, for optimizers whose steps are linear in the gradients
(docs/methods.md, "SOURCE on the recorded order").

The adjoint recursion of the recorded steps is run in a segment's eigenbasis, where every step is
elementwise. It is linear in the adjoint at the segment's end, so the steps act on one coefficient
per eigenvalue and never on the queries: the cost is one contraction per use of an example.
Gradients are interpolated between the two checkpoints around a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from tda_lightning.estimators.source.schedule import chunks
from tda_lightning.estimators.source.segments import (
    Adjoint,
    Crossing,
    FittedSegment,
    examples_as_queries,
)
from tda_lightning.estimators.source.spectral import LinearAdjoint, combined
from tda_lightning.gradients import Gradient


def cross(
    segments: Sequence[FittedSegment], number: int, adjoint: Adjoint, first_query: int
) -> Crossing:
    """Score the uses of examples in a segment and carry the adjoint of the queries to its start.

    With the first queries it also scores each example for itself, if that is asked for.
    """
    segment = segments[number]
    session, loads = segment.session, segment.scored_loads
    inside = {name: segment.enter(name, own) for name, own in adjoint.items()}
    with_self = session.self_influence and first_query == 0
    steps = _steps_back(segment)
    row, u = segment.steps.stop, dict[str, Tensor]()
    for batch in segment.walk(f"{segment.title}: recorded steps", loads):
        load = loads[batch.position]
        before, after = (segment.gradients(batch, step) for step in load.interval)
        measured = segment.measurement_gradients(batch) if with_self else {}
        some = next(iter(inside.values()))
        values = some.new_zeros(some.shape[1], len(load.rows))
        own_values = values.new_zeros(len(load.rows))
        for used_in, positions in load.runs():
            while row > used_in:
                row, u = next(steps)
            for name, coefficients in u.items():
                for part in chunks(positions, before[name].cost_per_example):
                    ends = [segment.coordinates(name, at[name], part) for at in (before, after)]
                    gradient = load.gradients(ends, part)
                    for coefficient, component in zip(coefficients, inside[name], strict=True):
                        weighted = (coefficient * gradient).flatten(1)
                        values[:, part] -= component.flatten(1) @ weighted.T
                    if with_self:
                        own = _carried(segments, number, name, measured[name], part)
                        taken = combined(coefficients, own)
                        own_values[part] -= (taken * gradient).flatten(1).sum(1)
        session.add(number, batch, values, first_query)
        if session.by_token:
            segment.add_terms(batch, load, _taken(segment, u, inside), first_query)
        if with_self:
            session.add_self_influence(batch.examples, own_values)
    return segment.crossing(adjoint, inside)


def _taken(segment: FittedSegment, u: Mapping[str, Tensor], inside: Adjoint) -> dict[str, Tensor]:
    """What the gradients of a step are multiplied by, on the parameters: [query, groups, rows,
    columns] by unit."""
    return {
        name: segment.geometry.on_parameters(
            name, segment.spectra[name].lift(combined(coefficients, inside[name]))
        )
        for name, coefficients in u.items()
    }


def _steps_back(segment: FittedSegment) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Each step, the last one first, with the coefficients of u by unit."""
    adjoints = {
        name: LinearAdjoint(spectrum.eigenvalues, segment.rule)
        for name, spectrum in segment.spectra.items()
    }
    for row, step, clipping in segment.linear_steps():
        yield row, {name: adjoint.step(step, clipping) for name, adjoint in adjoints.items()}


def _carried(
    segments: Sequence[FittedSegment], number: int, name: str, measured: Gradient, rows: slice
) -> Tensor:
    """Examples' own measurement gradients, carried back to the end of segment ``number``."""
    for segment, adjoint in examples_as_queries(segments, name, measured, rows):
        if segment.number == number:
            return adjoint
    raise AssertionError(number)
