"""SOURCE for SGD, in the order of the batches (docs/methods.md, "SOURCE on the recorded order").

The adjoint recursion of the recorded steps is run in a segment's eigenbasis, where every step is
elementwise. It is linear in the adjoints (a, b) that enter at the segment's end, so the steps act
on one coefficient per eigenvalue and never on the queries: the cost is one contraction per use of
an example. Gradients are interpolated between the two checkpoints around a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tda_lightning.curvature import units
from tda_lightning.estimators.queries import query_rounds
from tda_lightning.estimators.source.schedule import Load
from tda_lightning.estimators.source.segments import Adjoint, SegmentedRun
from tda_lightning.estimators.source.spectral import MomentumAdjoint
from tda_lightning.gradients import Gradient
from tda_lightning.gradients.forms import CHUNK_SCALARS
from tda_lightning.optimizers import rule_of
from tda_lightning.session.passes import Pass


@dataclass
class RecordedRun(SegmentedRun):
    """One attribution: curvature passes, then one walk back through each segment's steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adjoint = Adjoint({})
        self.inside = Adjoint({})
        self.steppers: dict[str, MomentumAdjoint] = {}
        self.next_row = 0
        self.u: dict[str, Tensor]  # coefficients of a and b = {}
        self.self_influence: Tensor | None = None
        self._loads: list[list[Load]] = []

    def passes(self) -> list[Pass]:
        passes = self.curvature_passes()
        for start, stop in query_rounds(self.context, self.copies):
            passes += self.round(start, stop)
        return passes

    copies = 6  # dense gradients of the queries in memory at a time

    def round(self, start: int, stop: int) -> list[Pass]:
        """The passes that score queries ``start`` to ``stop``."""
        if not self._loads:
            self._loads = [self.loads(segment) for segment in self.segments]
        passes = []
        with_self = self.context.self_influence and start == 0
        for number in reversed(range(len(self.segments))):
            loads = self._loads[number]
            passes.append(
                Pass(
                    f"segment {number + 1}: recorded steps",
                    self.segments[number].checkpoints[-1],
                    self._score(number, loads, start, with_self),
                    self._begin(number, start, stop),
                    self._end(number, with_self),
                    [load.examples for load in loads],
                )
            )
            passes += self.coupling_passes(number)
        return passes

    def _begin(self, number: int, start: int, stop: int) -> Callable[[], None]:
        def begin() -> None:
            if number == len(self.segments) - 1:
                self.adjoint = self.arrive(start, stop)
            self.inside = self.enter(number, self.adjoint)
            self.meet_frozen(number, self.inside)
            rule = rule_of(self.context.trajectory)
            self.steppers = {
                name: MomentumAdjoint(spectrum.eigenvalues, rule)
                for name, spectrum in self.spectra(number).items()
            }
            self.next_row = self.segments[number].stop - 1

        return begin

    def _end(self, number: int, with_self: bool) -> Callable[[], None]:
        def end() -> None:
            if self.goes_back(number):
                self.adjoint = self.depart(number, self.inside, self.adjoint)
            elif with_self:
                own = self.self_influence
                if own is None:  # this process had no batch
                    own = torch.zeros(
                        self.context.num_train,
                        dtype=self.context.dtype,
                        device=self.context.device,
                    )
                self.context.scores.set_self_influence(self.context.reduce(own).cpu())

        return end

    def _walk_to(self, number: int, row: int) -> None:
        """Go back through the steps until ``row`` has been taken."""
        while self.next_row >= row:
            step = self.linear_step(number, self.next_row)
            self.u = {name: stepper.step(*step) for name, stepper in self.steppers.items()}
            self.next_row -= 1

    def _score(self, number: int, loads: list[Load], first_query: int, with_self: bool) -> Any:
        def accumulate(batch: Any, examples: Tensor, position: int) -> None:
            context, load = self.context, loads[position]
            ends = [self._trained(step, batch, examples) for step in (load.before, load.after)]
            measured = self._measured(batch, examples) if with_self else None
            values = torch.zeros(
                len(next(iter(self.inside.a.values()))),
                len(examples),
                dtype=context.dtype,
                device=context.device,
            )
            own = values.new_zeros(len(examples))
            between = load.interpolation().to(values)[:, None, None, None]
            shares = load.shares.to(values)[:, None, None, None]
            for rows, row in runs(load.rows):
                self._walk_to(number, row)
                for name, (u_a, u_b) in self.u.items():
                    for part in chunks(rows, ends[0][name].cost_per_example):
                        gradient = self._interpolated(number, name, ends, between, part)
                        gradient = -shares[part] * gradient
                        values[:, part] += self.inside.a[name].flatten(1) @ (
                            (u_a * gradient).flatten(1).T
                        )
                        if self.inside.b is not None:
                            values[:, part] += self.inside.b[name].flatten(1) @ (
                                (u_b * gradient).flatten(1).T
                            )
                        if measured is not None:
                            query = self._carried(number, name, measured[name], part)
                            used = u_a * query.a[name]
                            if query.b is not None:
                                used = used + u_b * query.b[name]
                            own[part] += (used * gradient).flatten(1).sum(1)
            context.scores.add(number, examples, values, first_query)
            if with_self:
                if self.self_influence is None:
                    self.self_influence = values.new_zeros(context.num_train)
                self.self_influence.index_add_(0, examples, own)

        return accumulate

    def _trained(self, step: int, batch: Any, examples: Tensor) -> dict[str, Gradient]:
        self.context.load(step)
        return units(self.grouping, self.context.train_gradients(batch, examples).blocks)

    def _measured(self, batch: Any, examples: Tensor) -> dict[str, Gradient]:
        self.context.load(self.context.trajectory.last_step)
        found = self.context.measurement_gradients(batch, examples)
        return units(self.grouping, found.blocks)

    def _interpolated(
        self,
        number: int,
        name: str,
        ends: list[dict[str, Gradient]],
        between: Tensor,
        rows: slice,
    ) -> Tensor:
        before, after = (self.coordinates(number, name, end[name], rows) for end in ends)
        return torch.lerp(before, after, between[rows])

    def _carried(self, number: int, name: str, measured: Gradient, rows: slice) -> Adjoint:
        """The examples' own measurement gradients at the end of segment ``number``."""
        last = len(self.segments) - 1
        outside = Adjoint({name: measured.dense(rows)})
        inside = Adjoint({name: self.coordinates(last, name, measured, rows)})
        for later in range(last, number, -1):
            transfer = {name: self.transfers(later)[name]}
            outside = self.leave(later, inside, outside, transfer)
            inside = self.enter(later - 1, outside)
        return inside


def runs(rows: Tensor) -> list[tuple[slice, int]]:
    """Stretches of equal values: [(positions, value)]."""
    values, counts = torch.unique_consecutive(rows, return_counts=True)
    found, start = [], 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        found.append((slice(start, start + count), value))
        start += count
    return found


def chunks(rows: slice, scalars_per_example: int) -> list[slice]:
    size = max(1, CHUNK_SCALARS // scalars_per_example)
    return [slice(s, min(s + size, rows.stop)) for s in range(rows.start, rows.stop, size)]
