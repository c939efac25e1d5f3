"""SOURCE for Adam, in the order of the batches (docs/methods.md, "SOURCE on the recorded order").

Adam's step depends on the gradient through both moments. Holding the second one fixed in the
derivative is worse than averaging the order out (LDS 0.70 against 0.79), so the
adjoint (a, b, e) of parameters and both moments is followed, step by step, on the parameters;
only curvature is applied through a segment's eigenbasis. The moments between two checkpoints are
rebuilt from the recorded ones and the recorded batches' gradients, interpolated between the
checkpoints around a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tda_lightning.curvature import unit_matrices, units
from tda_lightning.estimators.queries import query_rounds
from tda_lightning.estimators.source.recorded import chunks, runs
from tda_lightning.estimators.source.schedule import Load, interval_around
from tda_lightning.estimators.source.segments import Adjoint, SegmentedRun
from tda_lightning.gradients import Gradient
from tda_lightning.optimizers import (
    ParameterStep,
    recorded_states,
    require_formula,
    row_settings,
)
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Segment
from tda_lightning.session.passes import Pass, memory_budget

Units = dict[str, Tensor]


@dataclass(frozen=True)
class StepSettings:
    """Hyper-parameters of one step; tensors [groups, rows, columns] by unit where parameter
    groups differ."""

    rate: Units
    clipping: float
    shared: dict[str, float]
    coupled: Units
    decoupled: Units


@dataclass
class _Moments:
    """Gradient, first and second moment of every step since checkpoint ``start``, by unit:
    [steps, groups, rows, columns]."""

    start: int
    gradient: Units
    first: Units
    second: Units


@dataclass
class RecordedAdamRun(SegmentedRun):
    """One attribution: curvature, then for every interval between checkpoints, last first, a walk
    that rebuilds the moments and a walk back."""

    def __post_init__(self) -> None:
        self.rule = require_formula(self.context.trajectory, "advance", "order='recorded'")
        super().__post_init__()
        self.a: Units = {}
        self.b: Units = {}
        self.e: Units = {}
        self.moments = _Moments(0, {}, {}, {})
        self.next_row = 0
        self.u: Units = {}
        self._groups: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self.response: Units = {}
        self._require_memory(sorted(self.context.trajectory.checkpoints))

    copies = 6  # dense gradients of the queries in memory at a time

    def passes(self) -> list[Pass]:
        passes = self.curvature_passes()
        for start, stop in query_rounds(self.context, self.copies):
            passes += self.round(start, stop)
        return passes

    def round(self, start: int, stop: int) -> list[Pass]:
        """The passes that score queries ``start`` to ``stop``."""
        passes: list[Pass] = []
        for number in reversed(range(len(self.segments))):
            loads = self.loads(self.segments[number])
            for interval in dict.fromkeys((load.before, load.after) for load in loads):
                own = [load for load in loads if (load.before, load.after) == interval]
                begin = self._begin(start, stop, not passes)
                passes += self._interval_passes(number, own, interval, begin, start)
            passes += self.coupling_passes(number)
        return passes

    def _interval_passes(
        self,
        number: int,
        loads: list[Load],
        interval: tuple[int, int],
        begin: Callable[[], None],
        first_query: int,
    ) -> list[Pass]:
        before, after = interval
        rows = torch.cat([load.rows for load in loads])
        # A segment may begin inside the interval; the moments are known at its start only.
        whole = [*loads, *self._earlier(before, int(rows.min()))]
        last = int(rows.max())
        title = f"segment {number + 1}: steps {int(rows.min()) + 1} to {last + 1}"
        return [
            Pass(
                f"{title}, moments",
                after,
                self._gather(whole, before, last),
                lambda: self._start_moments(before, last),
                lambda: self._finish_moments(before, last),
                [load.examples for load in whole],
            ),
            Pass(
                title,
                after,
                self._score(number, loads, first_query),
                self._then(begin, last),
                lambda: self._end(number, int(rows.min())),
                [load.examples for load in loads],
                catches_up=True,
            ),
        ]

    def _earlier(self, start: int, stop: int) -> list[Load]:
        if start >= stop:
            return []
        return self.loads(Segment(start, stop, ()))

    def _require_memory(self, checkpoints: list[int]) -> None:
        longest = max(
            interval_around(checkpoints, row)[1] - interval_around(checkpoints, row)[0]
            for row in range(self.context.trajectory.last_step)
        )
        size = sum(block.size for block in self.context.blocks)
        needed = 3 * longest * size * torch.finfo(self.context.dtype).bits // 8
        if needed > memory_budget():
            raise UnsupportedTrainingError(
                f"order='recorded' keeps the moments of the {longest} steps between two "
                f"checkpoints, {needed / 2**30:.1f} GiB, and {memory_budget() / 2**30:.1f} GiB "
                "may be used. Record more checkpoints, or use order='average'."
            )

    def _then(self, begin: Callable[[], None], last: int) -> Callable[[], None]:
        def both() -> None:
            begin()
            self.next_row = last

        return both

    def _begin(self, start: int, stop: int, fresh: bool) -> Callable[[], None]:
        def begin() -> None:
            if fresh:
                held = self.context.loaded_step
                found = self.arrive(start, stop)
                self.a = found.a
                self.b = found.b or {name: torch.zeros_like(a) for name, a in self.a.items()}
                self.e = found.e or {name: torch.zeros_like(a) for name, a in self.a.items()}
                self.context.load(held)

        return begin

    def _end(self, number: int, row: int) -> None:
        """Take the steps down to ``row``; at a segment's start, tell the stages before."""
        self._walk_to(number, row)
        if self.link is None or row > self.segments[number].start:
            return
        if self.link.couples:
            self.link.meet(self.grouping, self.response)
        self.response = {}
        if number == 0:
            self.link.depart(self.grouping, Adjoint(self.a, self.b, self.e))

    # Rebuilding the moments

    def _start_moments(self, start: int, last: int) -> None:
        context = self.context
        shapes = {b.name: torch.empty(b.shape, device="meta") for b in context.blocks}
        self.moments = _Moments(
            start,
            {
                name: torch.zeros(
                    last + 1 - start, *matrix.shape, dtype=context.dtype, device=context.device
                )
                for name, matrix in unit_matrices(self.grouping, shapes).items()
            },
            {},
            {},
        )

    def _gather(self, loads: list[Load], start: int, last: int) -> Any:
        def accumulate(batch: Any, examples: Tensor, position: int) -> None:
            load = loads[position]
            ends = self._ends(load, batch, examples)
            for name, total in self.moments.gradient.items():
                between = load.interpolation().to(total)[:, None, None, None]
                shares = load.shares.to(total)[:, None, None, None]
                for rows, row in runs(load.rows):
                    for part in chunks(rows, ends[0][name].cost_per_example):
                        used = shares[part] * _lerp(ends, name, between, part)
                        total[row - start] += used.sum(0)

        return accumulate

    def _finish_moments(self, start: int, last: int) -> None:
        """Run the optimizer's own recursion over the rebuilt gradients, from the recorded
        moments."""
        context, keys, advance = self.context, self.rule.states, self.rule.advance
        assert advance is not None
        reduced = {n: context.reduce(g) for n, g in self.moments.gradient.items()}
        weights = self._parameters(start)
        first, second = self._recorded_moments(start)
        kept_first = {name: torch.empty_like(g) for name, g in reduced.items()}
        kept_second = {name: torch.empty_like(g) for name, g in reduced.items()}
        following = min(step for step in context.trajectory.checkpoints if step > start)
        end, length = self._parameters(following), following - start
        for row in range(start, last + 1):
            settings = self._settings(row)
            for name, gradient in reduced.items():
                at = torch.lerp(weights[name], end[name], (row - start) / length)
                gradient[row - start] *= settings.clipping
                gradient[row - start] += settings.coupled[name] * at
                now = gradient[row - start]
                own = dict(zip(keys, (first[name], second[name]), strict=True))
                own = advance(own, now, settings.shared)
                first[name], second[name] = (own[key] for key in keys)
                kept_first[name][row - start] = first[name]
                kept_second[name][row - start] = second[name]
        self.moments = _Moments(start, reduced, kept_first, kept_second)

    def _parameters(self, step: int) -> Units:
        values = self.context.trajectory.checkpoints[step].parameters
        return self._unit(values)

    def _recorded_moments(self, step: int) -> tuple[Units, Units]:
        trajectory = self.context.trajectory
        before = trajectory.steps_before
        states = recorded_states(trajectory, step) if step > 0 or before else {}
        if step == 0:
            # What a new optimizer begins with is not what the one before left.
            states = {name: state for name, state in states.items() if name in before}
        moments = []
        for key in self.rule.states:
            filled = {
                name: states[name][key] if key in states.get(name, {}) else torch.zeros(fact.shape)
                for name, fact in trajectory.facts.parameters.items()
            }
            moments.append(self._unit(filled))
        return moments[0], moments[1]

    def _unit(self, values: Mapping[str, Tensor]) -> Units:
        context = self.context
        placed = {
            name: values[name].to(context.device, context.dtype) for name in context.engine.names
        }
        matrices = {block.name: block.matrix(placed) for block in context.blocks}
        return unit_matrices(self.grouping, matrices)

    # The walk back

    def _score(self, number: int, loads: list[Load], first_query: int) -> Any:
        def accumulate(batch: Any, examples: Tensor, position: int) -> None:
            load, context = loads[position], self.context
            ends = self._ends(load, batch, examples)
            template = next(iter(self.a.values()))
            values = template.new_zeros(len(template), len(examples))
            between = load.interpolation().to(values)[:, None, None, None]
            shares = load.shares.to(values)
            for rows, row in runs(load.rows):
                self._walk_to(number, row)
                for name, u in self.u.items():
                    for part in chunks(rows, ends[0][name].cost_per_example):
                        gradient = _lerp(ends, name, between, part).flatten(1)
                        values[:, part] -= shares[part] * (u.flatten(1) @ gradient.T)
            context.scores.add(number, examples, values, first_query)

        return accumulate

    def _walk_to(self, number: int, row: int) -> None:
        """Go back through the steps until ``row`` has been taken."""
        while self.next_row >= row:
            self.u = self._step(number, self.next_row)
            self.next_row -= 1

    def _step(self, number: int, row: int) -> Units:
        """One step of the adjoint back (docs/methods.md, "Exact unrolling"), and u."""
        rule, settings, at = self.rule, self._settings(row), row - self.moments.start
        assert rule.adjoint is not None and rule.metric is not None
        found = {}
        for name, taken in self._steps_before().items():
            a, moments = self.a[name], (self.moments.first[name][at], self.moments.second[name][at])
            step = ParameterStep(
                settings.rate[name],
                settings.shared,
                self.moments.gradient[name][at],
                dict(zip(rule.states, moments, strict=True)),
                taken + row + 1,
            )
            adjoints = dict(zip(rule.states, (self.b[name], self.e[name]), strict=True))
            u = rule.adjoint(a, adjoints, step)
            self.b[name], self.e[name] = (adjoints[key] for key in rule.states)
            # A coordinate that has never moved passes nothing on.
            moved = rule.metric(step.states, settings.shared, step.count) > 0
            u = torch.where(moved, u, 0.0)
            a *= 1 - settings.decoupled[name]
            clipped = settings.clipping * u
            a += settings.coupled[name] * u + self._curve(number, name, clipped)
            found[name] = clipped
            if self.link is not None and self.link.couples:
                known = self.response.get(name)
                self.response[name] = -clipped if known is None else known - clipped
        return found

    def _steps_before(self) -> Units:
        """How often each parameter had been stepped before row 0."""
        if not self._counts:
            trajectory = self.context.trajectory
            self._counts = self._unit(
                {
                    name: torch.full(fact.shape, float(trajectory.steps_before.get(name, 0)))
                    for name, fact in trajectory.facts.parameters.items()
                }
            )
        return self._counts

    def _curve(self, number: int, name: str, u: Tensor) -> Tensor:
        """H u, from the curvature h H h of the preconditioned gradients."""
        spectrum = self.curvature(number)[name]
        scale = self.geometries[number].scale.get(name)
        inverse = None if scale is None else torch.where(scale > 0, 1 / scale, 0.0)
        inside = spectrum.project(u if inverse is None else u * inverse)
        curved = spectrum.lift(spectrum.eigenvalues * inside)
        return curved if inverse is None else curved * inverse

    def _settings(self, row: int) -> StepSettings:
        steps, facts = self.context.trajectory.steps, self.context.trajectory.facts
        hyper = {name: values[row] for name, values in steps.hyperparameters.items()}
        if not self._groups:
            self._groups = self._unit(
                {
                    name: torch.full(fact.shape, float(fact.group))
                    for name, fact in facts.parameters.items()
                }
            )
        rates, decay = steps.learning_rate[row], hyper["weight_decay"]
        decoupled = self.rule.decoupled
        return StepSettings(
            self._by_group(rates),
            float(self.context.trajectory.clipping_factors(slice(row, row + 1))),
            row_settings(self.context.trajectory, row, 0),
            self._by_group(torch.zeros_like(decay) if decoupled else decay),
            self._by_group(rates * decay if decoupled else torch.zeros_like(decay)),
        )

    def _by_group(self, values: Tensor) -> Units:
        table = values.to(self.context.device, self.context.dtype)
        return {name: table[groups.long()] for name, groups in self._groups.items()}

    def _ends(self, load: Load, batch: Any, examples: Tensor) -> list[dict[str, Gradient]]:
        found = []
        for step in (load.before, load.after):
            self.context.load(step)
            gradients = self.context.train_gradients(batch, examples)
            found.append(units(self.grouping, gradients.blocks))
        return found


def _lerp(ends: list[dict[str, Gradient]], name: str, between: Tensor, rows: slice) -> Tensor:
    before, after = (end[name].dense(rows) for end in ends)
    return torch.lerp(before, after, between[rows])
