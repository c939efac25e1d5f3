"""What both orders of SOURCE share: each segment's geometry and curvature, and how the adjoint of
a query goes from one segment to the one before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tda_lightning.curvature import (
    DeflatedSpectrum,
    LeadingDirections,
    Spectrum,
    curvature_of,
    leading_directions,
)
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.estimators.queries import query_gradients
from tda_lightning.estimators.source.geometry import segment_geometry
from tda_lightning.estimators.source.schedule import Load, recorded_loads
from tda_lightning.estimators.source.spectral import (
    MomentumAdjoint,
    segment_decay,
    segment_response,
)
from tda_lightning.gradients import Gradient, scaled
from tda_lightning.optimizers import (
    WEIGHT_DECAY,
    ParameterStep,
    applied_rates,
    first_step_differs,
    row_settings,
    rule_of,
)
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Segment
from tda_lightning.session.passes import Pass, Session

if TYPE_CHECKING:
    from tda_lightning.estimators.source.coupling import StageLink
    from tda_lightning.estimators.source.estimator import Source

Curvature = Spectrum | DeflatedSpectrum
Pair = tuple[Tensor, Tensor | None]  # factors of the adjoints (a, b); b None without a buffer


@dataclass(frozen=True)
class Transfer:
    """One unit's segment as factors of the adjoints at its end, by eigenvalue: what the segment
    takes in (``response``) and the adjoints at its start."""

    response: Pair
    a: Pair
    b: tuple[Tensor, Tensor] | None


@dataclass
class Adjoint:
    """Adjoints of parameters (a) and the optimizer's states (a momentum buffer b, or two moments
    b and e) of some queries, by unit: [query, groups, rows, columns]."""

    a: dict[str, Tensor]
    b: dict[str, Tensor] | None = None
    e: dict[str, Tensor] | None = None


def combine(factors: Pair, a: Tensor, b: Tensor | None) -> Tensor:
    """factors . (a, b)."""
    out = factors[0] * a
    return out if b is None or factors[1] is None else out + factors[1] * b


@dataclass
class SegmentedRun:
    """Segments with their geometry and curvature.

    Attributes:
        link: to the stages of training before and after these segments; None for a single stage.
    """

    options: Source
    context: Session
    link: StageLink | None = None
    segments: tuple[Segment, ...] = field(init=False)

    def __post_init__(self) -> None:
        options, context = self.options, self.context
        self._require_one_recursion()
        self.segments = context.trajectory.segments(options.cuts())
        # With leading directions, the unit of curvature is all parameters together.
        leading = options.leading(context)
        self.grouping = "exact" if leading else options.curvature
        kind = options.curvature
        self.geometries = [segment_geometry(context, s, self.grouping) for s in self.segments]
        self.block_geometries = [segment_geometry(context, s, kind) for s in self.segments]
        self.fits: list[dict[str, Spectrum]] = []
        self.leading: list[LeadingDirections] = []
        self._curvature: dict[int, Mapping[str, Curvature]] = {}
        self._spectra: dict[int, dict[str, Curvature]] = {}
        self._transfers: dict[int, dict[str, Transfer]] = {}

    def curvature_passes(self) -> list[Pass]:
        """A pass that fits what is not kept from before."""
        last = self.context.trajectory.last_step
        return [Pass("curvature", last, lambda *_: None, self._fit, rows=())]

    def _fit(self) -> None:
        options, session = self.options, self.context
        for number, segment in enumerate(self.segments):
            self.fits.append(
                curvature_of(
                    options.statistics,
                    options.curvature,
                    session,
                    (segment.start, segment.stop),
                    segment.checkpoints,
                    self.block_geometries[number].scale,
                    options.seed,
                    f"segment {number + 1}",
                    options.dense_side,
                )
            )
        count = options.leading(session)
        for number, segment in enumerate(self.segments if count else ()):
            scale = self.geometries[number].scale.get(WHOLE)
            title = f"segment {number + 1}"
            self.leading.append(
                leading_directions(count, session, segment.checkpoints, scale, options.seed, title)
            )

    def curvature(self, number: int) -> Mapping[str, Curvature]:
        """Curvature of segment ``number`` on the device, by unit."""
        if number not in self._curvature:
            spectra = self.fits[number]
            self._curvature[number] = (
                {WHOLE: DeflatedSpectrum.of(self.leading[number], self.context.blocks, spectra)}
                if self.leading
                else spectra
            )
        return self._curvature[number]

    def spectra(self, number: int) -> dict[str, Curvature]:
        """Curvature of segment ``number`` plus weight decay, by unit."""
        if number not in self._spectra:
            decay = self.geometries[number].decay
            self._spectra[number] = {
                name: spectrum.shifted(decay[name])
                for name, spectrum in self.curvature(number).items()
            }
        return self._spectra[number]

    def arrive(self, start: int, stop: int) -> Adjoint:
        """The adjoints of queries ``start`` to ``stop`` at the end of the last segment."""
        if self.link is not None:
            return self.link.arrive(self.grouping, start, stop)
        self.context.load(self.context.trajectory.last_step)
        return Adjoint(query_gradients(self.context, self.grouping, start, stop))

    def goes_back(self, number: int) -> bool:
        """Whether anything was trained before segment ``number``."""
        return number > 0 or (self.link is not None and self.link.has_earlier)

    def depart(self, number: int, inside: Adjoint, before: Adjoint) -> Adjoint:
        """:meth:`leave`, which the stage before learns of when it was the first segment."""
        adjoint = self.leave(number, inside, before, self.transfers(number))
        if number == 0 and self.link is not None:
            self.link.depart(self.grouping, adjoint)
        return adjoint

    def meet_frozen(self, number: int, inside: Adjoint) -> None:
        """Tell the frozen parameters how segment ``number`` responds to the queries."""
        if self.link is None or not self.link.couples:
            return
        geometry, spectra = self.geometries[number], self.spectra(number)
        response = {}
        for name, transfer in self.transfers(number).items():
            b = None if inside.b is None else inside.b[name]
            taken = combine(transfer.response, inside.a[name], b)
            response[name] = geometry.enter(name, spectra[name].lift(taken))
        self.link.meet(self.grouping, response)

    def coupling_passes(self, number: int) -> list[Pass]:
        """The passes that carry the frozen parameters' adjoint across segment ``number``."""
        if self.link is None:
            return []
        return self.link.passes(self.segments[number].checkpoints, f"segment {number + 1}")

    def loads(self, segment: Segment) -> list[Load]:
        """The recorded uses of examples in ``segment``, last step first."""
        context = self.context
        return recorded_loads(context.trajectory, segment, context.batch_size, context.task.share)

    @property
    def follows_buffer(self) -> bool:
        """Whether the adjoint of the momentum buffer is carried along."""
        linear = rule_of(self.context.trajectory).linear
        return linear and (self.options.order == "recorded" or self.options.momentum == "recursion")

    def _require_one_recursion(self) -> None:
        """Steps that are followed one by one must follow one recursion in all groups."""
        keys: tuple[str, ...] = ()
        if self.follows_buffer or self.options.order == "recorded":
            settings = rule_of(self.context.trajectory).settings
            keys = tuple(key for key in settings if key != WEIGHT_DECAY)
        for key in keys:
            values = self.context.trajectory.steps.hyperparameters[key]
            differs = (values != values[:, :1]).any(1)
            if bool(differs.any()):
                found = values[int(differs.nonzero()[0])].tolist()
                raise UnsupportedTrainingError(
                    f"The parameter groups have different {key} {found}: following the "
                    "optimizer step by step needs one. Use order='average' with "
                    "momentum='effective_rate'."
                )
        if self.follows_buffer:
            self._require_one_beginning()

    def _require_one_beginning(self) -> None:
        """A new buffer's first step is not damped, and a step is damped for all or for none."""
        trajectory = self.context.trajectory
        names = self.context.engine.names
        new = [name for name in names if name not in trajectory.steps_before]
        if 0 < len(new) < len(names) and first_step_differs(trajectory):
            raise UnsupportedTrainingError(
                f"Dampening does not act on a parameter's first step: {new[0]} ({len(new)} "
                "parameters in all) had its first where a stage of this run began, and "
                f"{len(names) - len(new)} others had not. Use order='average' with "
                "momentum='effective_rate'."
            )

    def transfers(self, number: int) -> dict[str, Transfer]:
        """What segment ``number`` does to the adjoints, by unit."""
        if number not in self._transfers:
            self._transfers[number] = {
                name: self._transfer(number, spectrum.eigenvalues)
                for name, spectrum in self.spectra(number).items()
            }
        return self._transfers[number]

    def _transfer(self, number: int, eigenvalues: Tensor) -> Transfer:
        time = self.geometries[number].time
        if not self.follows_buffer:
            response = segment_response(time)(eigenvalues)
            return Transfer((response, None), (segment_decay(time)(eigenvalues), None), None)
        adjoint = MomentumAdjoint(eigenvalues, rule_of(self.context.trajectory))
        taken = [torch.zeros_like(eigenvalues), torch.zeros_like(eigenvalues)]
        for row in reversed(range(self.segments[number].start, self.segments[number].stop)):
            for total, u in zip(taken, adjoint.step(*self.linear_step(number, row)), strict=True):
                total -= u
        a, b = adjoint.a, adjoint.b
        return Transfer((taken[0], taken[1]), (a[0], a[1]), (b[0], b[1]))

    def linear_step(self, number: int, row: int) -> tuple[ParameterStep, float]:
        """One step for the reference group, and what its gradient was clipped by.

        The other groups' rates are in the geometry, as ratios over the whole segment; weight decay
        is in the eigenvalues.
        """
        trajectory = self.context.trajectory
        group = int(applied_rates(trajectory, self.segments[number].rows).sum(0).argmax())
        first = row == 0 and not trajectory.steps_before.keys() & set(self.context.engine.names)
        step = ParameterStep(
            float(trajectory.steps.learning_rate[row, group]),
            row_settings(trajectory, row, group),
            gradient=torch.zeros(0),
            states={},
            new_states=frozenset(rule_of(trajectory).states if first else ()),
        )
        return step, float(trajectory.clipping_factors(slice(row, row + 1)))

    def enter(self, number: int, adjoint: Adjoint) -> Adjoint:
        """The adjoints in the eigenbasis of segment ``number``."""
        geometry, spectra = self.geometries[number], self.spectra(number)
        a = {n: spectra[n].project(geometry.enter(n, x)) for n, x in adjoint.a.items()}
        if adjoint.b is None:
            return Adjoint(a)
        b = {}
        for name, value in adjoint.b.items():
            if name in geometry.scale:
                scale = geometry.scale[name]
                value = torch.where(scale > 0, value / scale.clamp(min=1e-30), 0.0)
            b[name] = spectra[name].project(value)
        return Adjoint(a, b)

    def leave(
        self, number: int, inside: Adjoint, before: Adjoint, transfers: Mapping[str, Transfer]
    ) -> Adjoint:
        """The adjoints at the start of segment ``number``, back on the parameters.

        ``inside`` holds the coordinates at its end, ``before`` the same on the parameters.
        """
        geometry, spectra = self.geometries[number], self.spectra(number)
        a, b = {}, {}
        for name, transfer in transfers.items():
            own_b = None if inside.b is None else inside.b[name]
            carried = spectra[name].lift(combine(transfer.a, inside.a[name], own_b))
            a[name] = geometry.leave(name, carried, before.a[name])
            if transfer.b is not None:
                lifted = spectra[name].lift(combine(transfer.b, inside.a[name], own_b))
                b[name] = geometry.enter(name, lifted)
        return Adjoint(a, b or None)

    def coordinates(self, number: int, name: str, gradient: Gradient, rows: slice) -> Tensor:
        """h * g of some examples in the eigenbasis of segment ``number``."""
        spectrum = self.spectra(number)[name]
        own = scaled(gradient, self.geometries[number].scale.get(name))
        return spectrum.coordinates(own, rows)
