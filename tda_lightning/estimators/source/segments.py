"""A segment of training: its metric, its curvature, and what it does to the queries' adjoints.

The update is theta -= eta P (g + decay). With h = P^(1/2), everything is symmetric in the
coordinates theta / h: gradients become h * g, curvature h H h, and SOURCE's formulas hold as for
plain gradient descent (docs/methods.md, "SOURCE for Adam").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from tda_lightning.curvature import DeflatedSpectrum, Spectrum, unit_matrices, units
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.estimators.queries import unit_directions
from tda_lightning.estimators.source.felt import felt
from tda_lightning.estimators.source.schedule import Load, recorded_batches, recorded_loads
from tda_lightning.estimators.source.spectral import (
    Transfer,
    averaged_transfer,
    combined,
    stepwise_transfer,
)
from tda_lightning.gradients import Gradient, scaled
from tda_lightning.gradients.rows import restricted, touched_rows
from tda_lightning.optimizers import (
    WEIGHT_DECAY,
    OptimizerRule,
    ParameterStep,
    applied_rates,
    checkpoint_metric,
    first_step_differs,
    row_settings,
    rule_of,
    weight_decay,
)
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Segment
from tda_lightning.replay.recorded_draws import RecordedDraws
from tda_lightning.session.session import Batch, Session, Span

# Derivatives of the queries' measurements at one moment of training, by unit of curvature:
# [component, query, groups, rows, columns]. The first component is that of the parameters, the
# others are those of the optimizer's states.
Adjoint: TypeAlias = "dict[str, Tensor]"
Curvature: TypeAlias = "Spectrum | DeflatedSpectrum"


@dataclass(frozen=True)
class Metric:
    """How far the optimizer's step at a checkpoint carries a gradient of attribution.

    Attributes:
        values: P by parameter, float64, times ``felt``.
        felt: the share of the gradient that training felt; empty: all of it.
    """

    values: Mapping[str, Tensor]
    felt: Mapping[str, Tensor]


@dataclass(frozen=True)
class Geometry:
    """How the optimizer of a segment turns a gradient into a step, by unit of curvature.

    Attributes:
        time: sum of the reference group's applied rates over the segment, eta K.
        scale: h [groups, rows, columns]; units with h = 1 are missing.
        decay: what weight decay adds to h H h, on the parameters' diagonal.
        still: decay rate times time of coordinates that P does not move (h = 0); they keep their
            query but for decoupled decay.
    """

    time: float
    scale: dict[str, Tensor]
    decay: dict[str, Tensor]
    still: dict[str, Tensor]

    def restricted(self, rows: Mapping[str, Tensor]) -> Geometry:
        """Of some rows of some units alone."""

        def chosen(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: own[:, rows[n]] if n in rows else own for n, own in values.items()}

        return Geometry(self.time, chosen(self.scale), chosen(self.decay), chosen(self.still))

    def inverse(self, name: str) -> Tensor:
        """1 / h, and 0 where h = 0."""
        scale = self.scale[name]
        return torch.where(scale > 0, 1 / scale.clamp(min=1e-30), 0.0)

    def enter(self, name: str, adjoint: Tensor) -> Tensor:
        """Coordinates of a unit's adjoint: h times that of the parameters, 1 / h times those of
        states, which add up gradients."""
        if name not in self.scale:
            return adjoint
        states = [self.inverse(name)] * (len(adjoint) - 1)
        return adjoint * torch.stack([self.scale[name], *states])[:, None]

    def leave(self, name: str, carried: Tensor, before: Tensor) -> Tensor:
        """From coordinates back to the parameters; where h = 0, the adjoint at the end of the
        segment, ``before``."""
        if name not in self.scale:
            return carried
        scale = self.scale[name]
        states = [scale] * (len(carried) - 1)
        adjoint = carried * torch.stack([self.inverse(name), *states])[:, None]
        unmoved = before[0] * torch.exp(-self.time * self.still[name])
        adjoint[0] = torch.where(scale > 0, adjoint[0], unmoved)
        return adjoint

    def on_parameters(self, name: str, response: Tensor) -> Tensor:
        """h times a response [query, groups, rows, columns], which gradients are multiplied by."""
        return response * self.scale[name] if name in self.scale else response


def checkpoint_metrics(session: Session) -> dict[int, Metric]:
    """The optimizer's metric at every checkpoint, times what training felt (``felt.py``).

    Raises:
        UnsupportedTrainingError: the optimizer has no metric, or its states were not recorded.
    """
    metrics = {}
    for step in sorted(session.trajectory.checkpoints):
        metric = checkpoint_metric(session.trajectory, step) if step else {}
        if metric:
            share = felt(session, step)
            metrics[step] = Metric(
                {name: own * share.get(name, 1.0) for name, own in metric.items()}, share
            )
    return metrics


def unit_scales(session: Session, metric: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """h = P^(1/2) [groups, rows, columns] by unit; units with h = 1 are missing."""
    matrices = {block.name: block.matrix(metric) for block in session.blocks}
    return {
        name: own.sqrt().to(session.device, session.dtype)
        for name, own in unit_matrices(kind, matrices).items()
        if not bool((own == 1).all())
    }


def segment_geometry(
    session: Session, segment: Segment, kind: str, metrics: Mapping[int, Metric]
) -> Geometry:
    """The metric of ``segment`` for curvature of the given kind."""
    trajectory = session.trajectory
    rule = rule_of(trajectory)
    rates = applied_rates(trajectory, segment.rows)
    clipping = trajectory.clipping_factors(segment.rows)
    if not rule.linear:
        # The metric is that of clipped gradients, so the gradients must be clipped too.
        rates = rates * clipping
    times = rates.sum(0)
    time = float(times.max())
    ratios = times / time if time > 0 else torch.ones_like(times)
    raw = trajectory.steps.learning_rate[segment.rows]
    decays = weight_decay(trajectory, segment.rows)
    # Decay is not clipped: against gradients that are, it weighs more.
    total = (raw * clipping).sum(0)
    decay_of_group = torch.where(total > 0, (raw * decays).sum(0) / total.clamp(min=1e-300), 0.0)
    known = [metrics[step].values for step in segment.checkpoints if step in metrics]
    metric, decay, still = {}, {}, {}
    penalties = session.task.penalty.strengths
    for name in session.engine.names:
        fact = trajectory.facts.parameters[name]
        ratio, rate = float(ratios[fact.group]), float(decay_of_group[fact.group])
        ones = torch.ones(fact.shape, dtype=torch.float64)
        metric[name] = ratio * (_mean([own[name] for own in known]) if known else ones)
        # Decoupled decay acts on the parameters themselves, coupled decay passes through P.
        decay[name] = ratio * rate * ones if rule.decoupled else rate * metric[name]
        # A penalty in the loss is in the gradients, clipped as they are.
        decay[name] += penalties.get(name, 0.0) * metric[name]
        still[name] = ratio * rate * ones if rule.decoupled else torch.zeros_like(ones)

    def by_unit(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        matrices = {block.name: block.matrix(values) for block in session.blocks}
        return unit_matrices(kind, matrices)

    def placed(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: m.to(session.device, session.dtype) for name, m in matrices.items()}

    scales = unit_scales(session, metric, kind)
    return Geometry(time, scales, placed(by_unit(decay)), placed(by_unit(still)))


def _mean(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total / len(values)


@dataclass
class Crossing:
    """A segment behind us: its examples are scored.

    Attributes:
        adjoint: at its start; empty where nothing was trained before it.
        response: of the whole segment on the parameters, [query, groups, rows, columns] by unit;
            empty where nothing couples to it.
    """

    adjoint: Adjoint
    response: dict[str, Tensor]


@dataclass(frozen=True)
class FittedSegment:
    """A segment with its curvature.

    Attributes:
        session: the stage of training that it belongs to.
        number: its position in the stage, from 0.
        steps: which steps, and the checkpoints that represent them.
        kind: of curvature.
        geometry: the optimizer's metric.
        metrics: the optimizer's at every checkpoint of the stage; none where P = 1.
        curvature: of h * g, without weight decay, by unit; empty where it is only multiplied with.
        single_steps: whether steps are followed one by one; otherwise they are averaged.
        goes_back: whether anything was trained before it.
        couples: whether frozen parameters need its response.
        bounded: rows of single steps in which curvature was brought down to the edge of stability.
        draws: of a loss that draws random numbers, where the recorded order is followed.
    """

    session: Session
    number: int
    steps: Segment
    kind: str
    geometry: Geometry
    metrics: Mapping[int, Metric]
    curvature: Mapping[str, Curvature]
    single_steps: bool
    goes_back: bool
    couples: bool
    bounded: set[int] = field(default_factory=set)
    draws: RecordedDraws | None = None

    def restricted(self, rows: Mapping[str, Tensor]) -> FittedSegment:
        """The segment for queries that touch these rows, ascending, of blocks whose rows are
        looked up, and no others: as no eigenvector mixes rows, the others take no part."""
        if not rows:
            return self
        curvature = {
            name: own.restricted(rows[name]) if name in rows and isinstance(own, Spectrum) else own
            for name, own in self.curvature.items()
        }
        session, geometry = self.session.restricted(rows), self.geometry.restricted(rows)
        out = replace(self, session=session, geometry=geometry, curvature=curvature)
        spectra = dict(self.spectra)
        for name, own in rows.items():
            spectrum = spectra[name]
            assert isinstance(spectrum, Spectrum)
            spectra[name] = spectrum.restricted(own)
        vars(out).update(spectra=spectra)
        if self.rule.linear or not self.single_steps:  # the others have no transfer
            transfers = dict(self.transfers)
            for name, own in rows.items():
                response, carry = transfers[name].response, transfers[name].carry
                transfers[name] = Transfer(response[..., own, :], carry[..., own, :])
            vars(out).update(transfers=transfers)
        return out

    @property
    def looked_up(self) -> list[str]:
        """Units whose rows are looked up and not mixed by curvature."""
        rows_each = self.session.engine.rows_each
        spectra = ((name, own) for name, own in self.curvature.items() if name in rows_each)
        return [n for n, own in spectra if isinstance(own, Spectrum) and own.left is None]

    @property
    def title(self) -> str:
        """For progress bars."""
        return f"segment {self.number + 1}"

    @property
    def used(self) -> Span:
        """Its steps, whose use of examples weighs them."""
        return self.steps.start, self.steps.stop

    @property
    def grouping(self) -> str:
        """Kind of the units of gradients and adjoints: ``exact`` where all parameters are one."""
        return "exact" if WHOLE in self.geometry.decay else self.kind

    @property
    def components(self) -> int:
        """Of the adjoint at its end."""
        return 1 + len(self.rule.states) * self.single_steps

    @property
    def rule(self) -> OptimizerRule:
        """The optimizer's formulas."""
        return rule_of(self.session.trajectory)

    @cached_property
    def spectra(self) -> dict[str, Curvature]:
        """Curvature plus weight decay, by unit."""
        decay = self.geometry.decay
        return {name: own.shifted(decay[name]) for name, own in self.curvature.items()}

    @cached_property
    def transfers(self) -> dict[str, Transfer]:
        """What the segment does to adjoints, by unit."""
        return {name: self._transfer(own.eigenvalues) for name, own in self.spectra.items()}

    def _transfer(self, eigenvalues: Tensor) -> Transfer:
        if not self.single_steps:
            return averaged_transfer(eigenvalues, self.geometry.time)
        steps = ((step, clipping) for _, step, clipping in self.linear_steps())
        return stepwise_transfer(eigenvalues, self.rule, steps)

    @cached_property
    def loads(self) -> list[Load]:
        """The recorded uses of examples, last step first."""
        session = self.session
        size, share = session.batch_size, session.task.share
        if self.draws is not None:
            return recorded_batches(session.trajectory, self.steps, share)
        return recorded_loads(session.trajectory, self.steps, size, share)

    @cached_property
    def scored_loads(self) -> list[Load]:
        """The uses that are scored: the same, or those of the examples that edits change."""
        session, loads = self.session, self.loads
        if session.edits is not None:
            size, share = session.batch_size, session.task.share
            loads = recorded_loads(session.trajectory, self.steps, size, share, session.uses)
        # What gradients are multiplied by differs from step to step: terms are scored by it.
        return [part for load in loads for part in load.by_step()] if session.by_token else loads

    def add_terms(
        self, batch: Batch, load: Load, taken: Mapping[str, Tensor], first_query: int
    ) -> None:
        """Add the scores of the terms of a load of one step.

        Args:
            taken: minus what the step's gradients are multiplied by, on the parameters: [query,
                groups, rows, columns] by unit.
        """
        directions = unit_directions(self.session, {name: -own for name, own in taken.items()})
        for step, share in zip(load.interval, load.end_shares(), strict=True):
            if bool((share != 0).any()):
                self.session.load(step)
                self.session.add_terms(batch, directions, first_query, share)

    def walk(self, title: str, loads: Sequence[Load], scored: bool = True) -> Iterator[Batch]:
        """The examples of some loads; ``scored``: they are ``scored_loads``."""
        if self.draws is not None:
            places = [load.place for load in loads if load.place is not None]
            yield from self.draws.walk_places(title, places)
            return
        walk = self.session.walk_columns if scored else self.session.walk
        yield from walk(title, order=[load.examples for load in loads])

    def linear_steps(self) -> Iterator[tuple[int, ParameterStep, float]]:
        """Each row of the steps table with its step and clipping factor, the last one first.

        The steps are those of the reference group: the other groups' rates are in the geometry, as
        ratios over the whole segment. Weight decay is in the eigenvalues.
        """
        trajectory = self.session.trajectory
        group = int(applied_rates(trajectory, self.steps.rows).sum(0).argmax())
        fresh = not trajectory.steps_before.keys() & set(self.session.engine.names)
        for row in reversed(range(self.steps.start, self.steps.stop)):
            step = ParameterStep(
                rate=float(trajectory.steps.learning_rate[row, group]),
                settings=row_settings(trajectory, row, group),
                gradient=torch.empty(0),
                states={},
                new_states=frozenset(self.rule.states if fresh and row == 0 else ()),
            )
            yield row, step, float(trajectory.clipping_factors(slice(row, row + 1)))

    def units(self, gradients: Mapping[str, Gradient]) -> dict[str, Gradient]:
        """Gradients by block as gradients by unit of curvature."""
        return units(self.grouping, gradients)

    def gradients(self, batch: Batch, step: int) -> dict[str, Gradient]:
        """Training gradients of a batch at a checkpoint, by unit."""
        self.session.load(step)
        found = self.session.train_gradients(batch.data, batch.examples, batch.noise)
        return self.units(found.blocks)

    def measurement_gradients(self, batch: Batch) -> dict[str, Gradient]:
        """Measurement gradients of a batch of training examples at the end of training, by unit."""
        session = self.session
        session.load(session.trajectory.last_step)
        return self.units(session.measurement_gradients(batch.data, batch.examples).blocks)

    def coordinates(self, name: str, gradient: Gradient, rows: slice) -> Tensor:
        """h * g of some examples in the segment's eigenbasis."""
        own = scaled(gradient, self.geometry.scale.get(name))
        return self.spectra[name].coordinates(own, rows)

    def enter(self, name: str, adjoint: Tensor) -> Tensor:
        """A unit's adjoint at the segment's end, in the segment's eigenbasis."""
        return self.spectra[name].project(self.geometry.enter(name, adjoint))

    def leave(self, name: str, inside: Tensor, before: Tensor) -> Tensor:
        """A unit's adjoint at the segment's start, on the parameters.

        Args:
            inside: the adjoint at its end, in the eigenbasis.
            before: the same on the parameters.
        """
        carry = self.transfers[name].carry
        carried = torch.stack([combined(coefficients, inside) for coefficients in carry])
        return self.geometry.leave(name, self.spectra[name].lift(carried), before)

    def response(self, name: str, inside: Tensor) -> Tensor:
        """What a unit's gradients are multiplied by over the whole segment, on the parameters:
        [query, groups, rows, columns]."""
        response = self.spectra[name].lift(combined(self.transfers[name].response, inside))
        return self.geometry.on_parameters(name, response)

    def crossing(self, adjoint: Adjoint, inside: Adjoint) -> Crossing:
        """What is needed of the segment further back, from the adjoint at its end, on the
        parameters and in the eigenbasis."""
        crossing = Crossing({}, {})
        if self.goes_back:
            crossing.adjoint = {n: self.leave(n, own, adjoint[n]) for n, own in inside.items()}
        if self.couples:
            crossing.response = {n: self.response(n, own) for n, own in inside.items()}
        return crossing


def restricted_to_rows(
    segments: Sequence[FittedSegment], measured: Mapping[str, Gradient]
) -> tuple[list[FittedSegment], dict[str, Gradient]]:
    """The segments for some examples as queries, and their measurement gradients, with the rows
    alone that these touch."""
    names = segments[-1].looked_up
    rows = {name: own for name, own in touched_rows([measured]).items() if name in names}
    near = [segment.restricted(rows) for segment in segments]
    return near, {n: restricted(g, rows[n]) if n in rows else g for n, g in measured.items()}


def examples_as_queries(
    segments: Sequence[FittedSegment], name: str, measured: Gradient, rows: slice
) -> Iterator[tuple[FittedSegment, Tensor]]:
    """Follow a unit of some training examples' measurement gradients back through the segments.

    Yields:
        Every segment, the last one first, and the adjoint at its end in its eigenbasis,
        [component, example, groups, rows, columns].
    """
    last = segments[-1]
    inside = with_components(last.coordinates(name, measured, rows)[None], last.components)
    adjoint = inside  # read only where there is a metric
    if name in last.geometry.scale:
        adjoint = with_components(measured.dense(rows)[None], last.components)
    for number in reversed(range(len(segments))):
        yield segments[number], inside
        if number > 0:
            adjoint = segments[number].leave(name, inside, adjoint)
            inside = segments[number - 1].enter(name, adjoint)


def with_components(adjoint: Tensor, count: int) -> Tensor:
    """A unit's adjoint with ``count`` components: states that nothing depends on have 0."""
    missing = count - len(adjoint)
    if missing <= 0:
        return adjoint[:count]
    return torch.cat([adjoint, adjoint.new_zeros(missing, *adjoint.shape[1:])])


# Scores the examples of a segment, of which it is given the number, for the queries whose adjoint
# at its end is given; the last argument is the number of the first query.
Cross: TypeAlias = "Callable[[Sequence[FittedSegment], int, Adjoint, int], Crossing]"


def require_one_recursion(session: Session) -> None:
    """Refuse to follow single steps where they differ between parameters.

    Raises:
        UnsupportedTrainingError: parameter groups have different settings, or a state begins with
            the first step for some parameters only, and that makes a difference.
    """
    trajectory, names = session.trajectory, session.engine.names
    rule = rule_of(trajectory)
    advice = "Use order='average' with momentum='effective_rate'."
    for key in rule.settings:
        values = trajectory.steps.hyperparameters[key]
        differs = (values != values[:, :1]).any(1)
        if key != WEIGHT_DECAY and bool(differs.any()):
            raise UnsupportedTrainingError(
                f"The parameter groups have different {key} "
                f"{values[int(differs.nonzero()[0])].tolist()}: following the optimizer step by "
                f"step needs one. {advice}"
            )
    new = [name for name in names if name not in trajectory.steps_before]
    if rule.linear and 0 < len(new) < len(names) and first_step_differs(trajectory):
        raise UnsupportedTrainingError(
            f"Dampening does not act on a parameter's first step: {new[0]} ({len(new)} parameters "
            f"in all) had its first where a stage of this run began, and {len(names) - len(new)} "
            f"others had not. {advice}"
        )
