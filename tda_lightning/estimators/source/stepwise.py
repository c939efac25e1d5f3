"""SOURCE in the order of the batches, for optimizers whose steps are not linear in the gradients
(docs/methods.md, "SOURCE on the recorded order").

Adam's step, for example, depends on the gradient through both moments. Holding the second one fixed
in the derivative is worse than averaging the order out (LDS 0.70 against 0.79), so the adjoint of
parameters and states is followed, step by step, on the parameters; only curvature is applied
through a segment's eigenbasis. The states between two checkpoints are rebuilt from the recorded
ones and the recorded batches' gradients, interpolated between the checkpoints around a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_lightning.curvature import unit_matrices
from tda_lightning.estimators.source.schedule import Load, chunks, interval_around
from tda_lightning.estimators.source.segments import Adjoint, Crossing, FittedSegment
from tda_lightning.optimizers import (
    ParameterStep,
    recorded_states,
    require_formula,
    row_settings,
    weight_decay,
)
from tda_lightning.optimizers.rule import Squares
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Segment
from tda_lightning.replay.expected_squares import expects_squares
from tda_lightning.session.session import Session, memory_budget

Units = dict[str, Tensor]  # [groups, rows, columns] by unit


def cross(
    segments: Sequence[FittedSegment], number: int, adjoint: Adjoint, first_query: int
) -> Crossing:
    """Score the uses of examples in a segment, interval by interval between checkpoints, and carry
    the adjoint of the queries, in place, to its start."""
    segment = segments[number]
    session = segment.session
    crossing = Crossing(adjoint, {})
    for interval in dict.fromkeys(load.interval for load in segment.loads):
        loads = [load for load in segment.loads if load.interval == interval]
        first, last = int(loads[-1].rows.min()), int(loads[0].rows.max())
        title = f"{segment.title}: steps {first + 1} to {last + 1}"
        recorded = _rebuilt_steps(segment, loads, first, last, f"{title}, moments")
        steps = _steps_back(segment, recorded, range(first, last + 1), crossing)
        row, u = last + 1, dict[str, Tensor]()
        scored = [load for load in segment.scored_loads if load.interval == interval]
        for batch in segment.walk(title, scored):
            load = scored[batch.position]
            before, after = (segment.gradients(batch, step) for step in load.interval)
            queries = next(iter(adjoint.values())).shape[1]
            values = torch.zeros(
                queries, len(load.rows), dtype=session.dtype, device=session.device
            )
            for used_in, positions in load.runs():
                while row > used_in:
                    row, u = next(steps)
                for name, own in u.items():
                    for part in chunks(positions, before[name].cost_per_example):
                        ends = [at[name].dense(part) for at in (before, after)]
                        gradient = load.gradients(ends, part)
                        values[:, part] -= own.flatten(1) @ gradient.flatten(1).T
            session.add(number, batch, values, first_query)
            if session.by_token:
                segment.add_terms(batch, load, u, first_query)
        # The first steps may have no scored use, or their batches may be another process's.
        if session.num_processes > 1 or session.edits is not None:
            for _ in steps:
                pass
    return crossing


def require_memory(session: Session) -> None:
    """Check that the optimizer's states of the steps between two checkpoints can be held.

    Raises:
        UnsupportedTrainingError: they cannot.
    """
    trajectory = session.trajectory
    rule = require_formula(trajectory, "advance", "order='recorded'")
    longest = max(
        stop - start
        for start, stop in (interval_around(trajectory, row) for row in range(trajectory.last_step))
    )
    needed = longest * session.gradient_bytes(1 + len(rule.states))
    if needed > memory_budget():
        raise UnsupportedTrainingError(
            f"order='recorded' holds the states of {rule.name} in the {longest} steps between two "
            f"checkpoints, {needed / 2**30:.1f} GiB, and {memory_budget() / 2**30:.1f} GiB may be "
            "used. Record more checkpoints, or use order='average'."
        )


@dataclass
class _RecordedSteps:
    """What the optimizer saw in every step from row ``start`` to before ``stop``, two checkpoints,
    by unit: [step, groups, rows, columns].

    Attributes:
        gradients: clipped, with coupled weight decay.
        states: after each step, by their names.
    """

    start: int
    stop: int
    gradients: Units
    states: dict[str, Units]


def _rebuilt_steps(
    segment: FittedSegment, loads: Sequence[Load], first: int, last: int, title: str
) -> _RecordedSteps:
    """The steps between the checkpoints around rows ``first`` to ``last``: their gradients by a
    walk over the recorded batches, their states by the optimizer's own recursion."""
    trajectory, rule = segment.session.trajectory, segment.rule
    start, stop = loads[0].interval
    if (first, last + 1) != (start, stop):
        # The segment has a part of the interval; the states are known at the interval's ends only.
        loads = replace(segment, steps=Segment(start, stop, ())).loads
    gradients = _mean_gradients(segment, loads, start, stop - 1, title)
    recorded = _recorded_states(segment, start)
    states = {
        name: {key: torch.empty_like(own) for key in rule.states} for name, own in gradients.items()
    }
    weights, end = (_by_unit(segment, trajectory.checkpoints[s].parameters) for s in (start, stop))
    settings = _Settings(segment)
    assert rule.advance is not None
    for row in range(start, stop):
        coupled, clipping = settings.decay(row)[0], settings.clipping(row)
        for name, own in gradients.items():
            at = torch.lerp(weights[name], end[name], (row - start) / (stop - start))
            own[row - start].mul_(clipping).add_(coupled[name] * at)
    sums = _sums_of_squares(segment, gradients, recorded, start, stop)
    expected = expects_squares(trajectory)
    for row in range(start, stop):
        hyperparameters = row_settings(trajectory, row, 0)
        for name, own in gradients.items():
            gradient = own[row - start]
            if sums is not None and not expected:
                gradient.mul_(sums.factor(name))
            advanced = rule.advance(recorded[name], gradient, hyperparameters)
            if sums is not None and expected:
                advanced[sums.key] += sums.weights(hyperparameters)[1] * sums.missing(name)
            recorded[name] = advanced
            for key, value in advanced.items():
                states[name][key][row - start] = value
    return _RecordedSteps(start, stop, gradients, states)


@dataclass
class _SumsOfSquares:
    """What the optimizer summed up of squared gradients in some rows, beside what the rebuilt
    gradients make of it, by unit.

    Attributes:
        key: of the optimizer's state.
        weights: (keep, add) by settings (``OptimizerRule.squares``).
        felt: by the optimizer.
        seen: of the rebuilt gradients.
        total: weight of the rows in the sums.
    """

    key: str
    weights: Squares
    felt: Units
    seen: Units
    total: float

    def factor(self, name: str) -> Tensor:
        """What gradients must be multiplied by, so that their squares add up to what was felt.

        The gradients are those of eval mode, between two checkpoints. Where the run's own were
        smaller (dead units, what only shifts the input of a BatchNorm), moments rebuilt from them
        would be those of another run.
        """
        seen, felt = self.seen[name], self.felt[name]
        return torch.where(seen > 0, (felt / seen.clamp(min=1e-38)).sqrt(), 1.0)

    def missing(self, name: str) -> Tensor:
        """What every step must add to a squared gradient: the expected squares of a what-if run."""
        return (self.felt[name] - self.seen[name]).clamp(min=0) / self.total


def _sums_of_squares(
    segment: FittedSegment, gradients: Units, before: Mapping[str, Units], start: int, stop: int
) -> _SumsOfSquares | None:
    """Of the rows ``start`` to ``stop``; None for an optimizer that sums no squares up."""
    trajectory, rule = segment.session.trajectory, segment.rule
    if rule.squares is None:
        return None
    key, weights = rule.squares
    after = _recorded_states(segment, stop)
    felt, seen_by_unit, total = {}, {}, 0.0
    for row in range(start, stop):
        keep, add = weights(row_settings(trajectory, row, 0))
        total = keep * total + add
    for name, own in gradients.items():
        seen, left = torch.zeros_like(own[0]), before[name][key].clone()
        for row in range(start, stop):
            keep, add = weights(row_settings(trajectory, row, 0))
            seen.mul_(keep).addcmul_(own[row - start], own[row - start], value=add)
            left *= keep
        felt[name] = (after[name][key] - left).clamp(min=0)
        seen_by_unit[name] = seen
    return _SumsOfSquares(key, weights, felt, seen_by_unit, total)


def _mean_gradients(
    segment: FittedSegment, loads: Sequence[Load], start: int, last: int, title: str
) -> Units:
    """Gradients of the recorded batches' losses in rows ``start`` to ``last``, by unit."""
    session = segment.session
    shapes = {block.name: torch.empty(block.shape, device="meta") for block in session.blocks}
    totals = {
        name: torch.zeros(
            last + 1 - start, *matrix.shape, dtype=session.dtype, device=session.device
        )
        for name, matrix in unit_matrices(segment.grouping, shapes).items()
    }
    for batch in segment.walk(title, loads, scored=False):
        load = loads[batch.position]
        before, after = (segment.gradients(batch, step) for step in load.interval)
        weights = session.data_weights(batch.examples)
        for name, total in totals.items():
            for row, positions in load.runs():
                for part in chunks(positions, before[name].cost_per_example):
                    ends = [at[name].dense(part) for at in (before, after)]
                    gradient = load.gradients(ends, part)
                    if weights is not None:
                        gradient = gradient * weights[part, None, None, None]
                    total[row - start] += gradient.sum(0)
    return {name: session.reduce(total) for name, total in totals.items()}


def _recorded_states(segment: FittedSegment, step: int) -> dict[str, Units]:
    """The optimizer's states at a checkpoint, by their names, by unit; 0 where it had none yet."""
    trajectory, earlier = segment.session.trajectory, segment.session.trajectory.steps_before
    states = recorded_states(trajectory, step) if step > 0 or earlier else {}
    if step == 0:
        # What a new optimizer begins with is not what the one before left.
        states = {name: own for name, own in states.items() if name in earlier}
    by_key = {
        key: _by_unit(
            segment,
            {
                name: states.get(name, {}).get(key, torch.zeros(fact.shape))
                for name, fact in trajectory.facts.parameters.items()
            },
        )
        for key in segment.rule.states
    }
    return {name: {key: by_key[key][name] for key in by_key} for name in segment.spectra}


def _steps_back(
    segment: FittedSegment, recorded: _RecordedSteps, rows: range, crossing: Crossing
) -> Iterator[tuple[int, Units]]:
    """Take the adjoint of ``crossing`` back through the steps of ``rows``, and add up its
    response. Yields each row with u, [query, groups, rows, columns] by unit, which its gradients
    are multiplied by."""
    rule, settings = segment.rule, _Settings(segment)
    assert rule.adjoint is not None and rule.metric is not None
    share = segment.metrics[recorded.stop].felt
    felt = _by_unit(segment, share) if share else {}
    for row in reversed(rows):
        at = row - recorded.start
        rates, clipping = settings.rates(row), settings.clipping(row)
        coupled, decoupled = settings.decay(row)
        hyperparameters = row_settings(segment.session.trajectory, row, 0)
        u = {}
        for name, adjoint in crossing.adjoint.items():
            a, *states = adjoint.unbind()
            step = ParameterStep(
                rate=rates[name],
                settings=hyperparameters,
                gradient=recorded.gradients[name][at],
                states={key: value[at] for key, value in recorded.states[name].items()},
                count=settings.counts[name] + row + 1,
            )
            own = rule.adjoint(a, dict(zip(rule.states, states, strict=True)), step)
            # A coordinate that has never moved passes nothing on.
            metric = rule.metric(step.states, hyperparameters, step.count)
            own = torch.where(metric > 0, own, 0.0)
            u[name] = clipping * own * felt.get(name, 1.0)
            scale = (metric * felt.get(name, 1.0)).sqrt()
            a *= 1 - decoupled[name]
            a += coupled[name] * own + _curved(segment, name, u[name], scale, row)
            if segment.couples:
                taken = crossing.response.setdefault(name, torch.zeros_like(own))
                taken -= u[name]
        yield row, u


def _curved(segment: FittedSegment, name: str, u: Tensor, scale: Tensor, row: int) -> Tensor:
    """H u at the step of ``row``, whose metric has the root h_t = ``scale``.

    Within a segment the preconditioned curvature h H h is what lasts: H_t = (h H h) / (h_t h_t).
    The mean curvature of a segment in the metric of a single step would be too large without bound:
    while a unit is dead, its curvature is as small as its second moment. And as the run itself did
    not blow up, no eigenvalue counts beyond half the edge of stability (``OptimizerRule.edge``).
    """
    spectrum, edge = segment.curvature[name], _edge(segment, row)
    if bool((spectrum.eigenvalues > edge).any()):
        segment.bounded.add(row)
    inverse = torch.where(scale > 0, 1 / scale.clamp(min=1e-30), 0.0)
    inside = spectrum.eigenvalues.clamp(max=edge) * spectrum.project(u * inverse)
    return spectrum.lift(inside) * inverse


def _edge(segment: FittedSegment, row: int) -> float:
    """The largest eigenvalue of h H h that counts at the rate of ``row``."""
    trajectory, rule = segment.session.trajectory, segment.rule
    rate = float(trajectory.steps.learning_rate[row].max())
    count = segment.steps.stop - segment.steps.start
    edge = rule.edge(row_settings(trajectory, row, 0), count) if rule.edge else 1.0
    return edge / rate if rate > 0 else math.inf


def notes_on_bounds(segments: Sequence[FittedSegment]) -> list[str]:
    """Say in how many steps the curvature was bounded."""
    bounded = sum(len(segment.bounded) for segment in segments)
    if not bounded:
        return []
    steps = sum(segment.steps.stop - segment.steps.start for segment in segments)
    return [
        f"In {bounded} of {steps} steps the curvature that was fitted times the rate is beyond "
        "half of what is stable; it was brought down to that, where a displacement dies out. "
        "More checkpoints and segments follow the curvature closer."
    ]


class _Settings:
    """The optimizer's settings row by row, spread over the parameters of each unit.

    Attributes:
        counts: how often each parameter had been stepped before row 0.
    """

    def __init__(self, segment: FittedSegment) -> None:
        self._trajectory, self._rule = segment.session.trajectory, segment.rule
        facts, before = self._trajectory.facts.parameters, self._trajectory.steps_before

        def spread(numbers: Mapping[str, int]) -> Units:
            filled = {n: torch.full(fact.shape, numbers.get(n, 0)) for n, fact in facts.items()}
            return _by_unit(segment, filled)

        self.counts = spread(before)
        self._groups = spread({name: fact.group for name, fact in facts.items()})
        strengths = segment.session.task.penalty.strengths
        penalties = {
            n: torch.full(fact.shape, strengths.get(n, 0.0), dtype=torch.float64)
            for n, fact in facts.items()
        }
        self._penalties = _by_unit(segment, penalties) if strengths else {}

    def rates(self, row: int) -> Units:
        """Learning rates."""
        return self._by_group(self._trajectory.steps.learning_rate[row])

    def clipping(self, row: int) -> float:
        """What the gradient was multiplied by."""
        return float(self._trajectory.clipping_factors(slice(row, row + 1)))

    def decay(self, row: int) -> tuple[Units, Units]:
        """Weight decay that is added to the gradient, times the parameters, and the share of the
        parameters that it takes off; of the optimizer's, one is 0. A penalty in the loss is added
        to the gradient and clipped with it."""
        decay = weight_decay(self._trajectory, slice(row, row + 1))[0]
        rates = self._trajectory.steps.learning_rate[row]
        coupled, decoupled = decay * (not self._rule.decoupled), decay * self._rule.decoupled
        added = self._by_group(coupled)
        for name, penalty in self._penalties.items():
            added[name] = added[name] + self.clipping(row) * penalty
        return added, self._by_group(rates * decoupled)

    def _by_group(self, values: Tensor) -> Units:
        return {name: values.to(own)[own.long()] for name, own in self._groups.items()}


def _by_unit(segment: FittedSegment, values: Mapping[str, Tensor]) -> Units:
    """Values of each parameter as matrices by unit."""
    session = segment.session
    placed = {name: values[name].to(session.device, session.dtype) for name in session.engine.names}
    matrices = {block.name: block.matrix(placed) for block in session.blocks}
    return unit_matrices(segment.grouping, matrices)
