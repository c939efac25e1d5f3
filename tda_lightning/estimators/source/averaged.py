"""SOURCE with the order of batches averaged out: the paper's form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tda_lightning.curvature import Spectrum, units
from tda_lightning.estimators.queries import Response, dot, query_rounds
from tda_lightning.estimators.source.segments import Adjoint, SegmentedRun, combine
from tda_lightning.gradients import Gradient
from tda_lightning.gradients.forms import CHUNK_SCALARS
from tda_lightning.session.passes import Pass


@dataclass
class AveragedRun(SegmentedRun):
    """One attribution: curvature passes, then scoring passes from the last segment to the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adjoint = Adjoint({})
        self.responses: dict[str, Response] = {}
        self.self_influence: Tensor | None = None

    def passes(self) -> list[Pass]:
        passes = self.curvature_passes()
        for start, stop in query_rounds(self.context, self.copies):
            passes += self.round(start, stop)
        if self.context.self_influence:
            last = self.context.trajectory.last_step
            passes.append(Pass("self-influence", last, self._add_self, None, self._finish_self))
        return passes

    @property
    def copies(self) -> int:
        """Dense gradients of the queries in memory at a time."""
        return 4 if self.follows_buffer else 3

    def round(self, start: int, stop: int) -> list[Pass]:
        """The passes that score queries ``start`` to ``stop``."""
        passes = []
        for number in reversed(range(len(self.segments))):
            for position, step in enumerate(self.segments[number].checkpoints):
                begin = self._begin(number, step, start, stop) if position == 0 else None
                title = f"segment {number + 1}: scores, step {step}"
                passes.append(Pass(title, step, self._score(number, start), begin))
            passes += self.coupling_passes(number)
        return passes

    def _begin(self, number: int, step: int, start: int, stop: int) -> Callable[[], None]:
        """Bring the queries to the end of segment ``number`` and take its response."""

        def begin() -> None:
            if number == len(self.segments) - 1:
                self.adjoint = self.arrive(start, stop)
                self.context.load(step)
            inside = self.enter(number, self.adjoint)
            self.meet_frozen(number, inside)
            transfers, spectra = self.transfers(number), self.spectra(number)
            geometry = self.geometries[number]
            meetings = self.context.num_train * len(self.segments[number].checkpoints)
            self.responses = {}
            for name, a in inside.a.items():
                b = None if inside.b is None else inside.b[name]
                taken = combine(transfers[name].response, a, b)
                spectrum = spectra[name]
                if isinstance(spectrum, Spectrum) and name not in geometry.scale:
                    self.responses[name] = Response(taken, spectrum, meetings)
                else:
                    on_parameters = geometry.enter(name, spectrum.lift(taken))
                    self.responses[name] = Response(on_parameters, None, meetings)
            if self.goes_back(number):
                self.adjoint = self.depart(number, inside, self.adjoint)

        return begin

    def _score(self, number: int, first_query: int) -> Any:
        share = 1 / (self.context.num_train * len(self.segments[number].checkpoints))

        def accumulate(batch: Any, examples: Tensor, _: int) -> None:
            found = self.context.train_gradients(batch, examples)
            gradients = units(self.grouping, found.blocks)
            values = dot(self.responses, gradients) * share
            self.context.scores.add(number, examples, values, first_query)

        return accumulate

    def _add_self(self, batch: Any, examples: Tensor, _: int) -> None:
        """Each example as its own query: gradients at all checkpoints, carried back together."""
        context, kind = self.context, self.grouping
        context.load(context.trajectory.last_step)
        measured = units(kind, context.measurement_gradients(batch, examples).blocks)
        trained: dict[int, dict[str, Gradient]] = {}
        for segment in self.segments:
            for step in segment.checkpoints:
                context.load(step)
                trained[step] = units(kind, context.train_gradients(batch, examples).blocks)
        if self.self_influence is None:
            self.self_influence = torch.zeros(
                context.num_train, dtype=context.dtype, device=context.device
            )
        for name, gradient in measured.items():
            chunk = max(1, CHUNK_SCALARS // gradient.cost_per_example)
            for start in range(0, len(examples), chunk):
                rows = slice(start, min(start + chunk, len(examples)))
                by_step = {step: found[name] for step, found in trained.items()}
                own = self._self_scores(name, gradient, by_step, rows)
                self.self_influence[examples[rows]] += own / context.num_train

    def _self_scores(
        self, name: str, measured: Gradient, trained: dict[int, Gradient], rows: slice
    ) -> Tensor:
        last = len(self.segments) - 1
        total: Tensor | float = 0.0
        inside = Adjoint({name: self.coordinates(last, name, measured, rows)})
        outside = Adjoint({})
        for number in reversed(range(last + 1)):
            transfer = self.transfers(number)[name]
            b = None if inside.b is None else inside.b[name]
            response = combine(transfer.response, inside.a[name], b)
            checkpoints = self.segments[number].checkpoints
            for step in checkpoints:
                coordinates = self.coordinates(number, name, trained[step], rows)
                total = total + (response * coordinates).flatten(1).sum(1) / len(checkpoints)
            if number > 0:
                if number == last and name in self.geometries[number].scale:
                    outside = Adjoint({name: measured.dense(rows)})
                outside = outside if outside.a else inside
                outside = self.leave(number, inside, outside, {name: transfer})
                inside = self.enter(number - 1, outside)
        assert isinstance(total, Tensor)
        return total

    def _finish_self(self) -> None:
        assert self.self_influence is not None
        self.context.scores.set_self_influence(self.context.reduce(self.self_influence).cpu())
