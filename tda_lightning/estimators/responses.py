"""What queries ask of training examples by way of the inverse curvature, apart from who is scored.

An estimator makes one :class:`Responses` object for an attribution, with :func:`responses_of`. For
each round of queries it then

1. plans ``passes(start, stop)``: what must run before the responses of the queries ``start`` to
   ``stop`` are there. The first call also fits what does not depend on the queries;
2. reads ``values`` (or calls ``dot``) in the passes of its own that follow, with whatever training
   examples it likes. The passes of the next round replace them;
3. adds ``provenance()`` and ``notes()`` to its own, once all passes have run.

``values`` are by unit of curvature, (H + (lambda + damping) I)^-1 grad m_q without the 1/N of the
scores. The units are those of ``units(kind, gradients)``: the blocks, or all parameters in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from tda_lightning.curvature import (
    CurvatureFit,
    RecordedFit,
    Spectrum,
    check_dense_side,
    check_kind,
    check_statistics,
    curvature_of,
    unit_matrices,
    units,
)
from tda_lightning.estimators.about import about_statistics
from tda_lightning.estimators.pairs import paired
from tda_lightning.estimators.queries import Response, dot, query_gradients
from tda_lightning.gradients import Gradient
from tda_lightning.passes import Context, Pass
from tda_lightning.trajectory import Trajectory


class InverseSettings(Protocol):
    """The settings of an estimator that determine its inverse curvature; see
    :class:`~tda_lightning.estimators.InfluenceFunction` for what they mean."""

    curvature: str
    damping: float | None
    relative_damping: float | None
    statistics: str
    dense_side: int | None
    seed: int


class Responses(Protocol):
    """The inverse-curvature responses of the queries of one attribution.

    Attributes:
        kind: of the units that ``values`` are by, for ``units(kind, gradients)``.
        copies: dense gradients that each query takes in memory at a time.
        values: of the queries of the round under way.
    """

    kind: str
    copies: int
    values: dict[str, Response]

    def passes(self, start: int, stop: int) -> list[Pass]:
        """What must run before ``values`` are those of the queries ``start`` to ``stop``."""

    def dot(self, gradients: Mapping[str, Gradient]) -> Tensor:
        """Inner products with training examples' gradients by block: [query, batch]."""

    def own(self, measured: Mapping[str, Gradient], trained: Mapping[str, Gradient]) -> Tensor:
        """What each example asks of itself, [batch], from the gradients by block of its measurement
        and its training loss."""

    def provenance(self) -> dict[str, Any]:
        """How they are made; complete when the passes have run."""

    def notes(self) -> list[str]:
        """What a reader should know of them; complete when the passes have run."""


def check_inverse(options: InverseSettings) -> None:
    """Refuse impossible settings.

    Raises:
        ValueError: says which.
    """
    check_kind(options.curvature)
    check_statistics(options.statistics, options.curvature)
    check_dense_side(options.dense_side)
    if options.damping is not None and options.relative_damping is not None:
        raise ValueError(
            f"Give damping (got {options.damping}) or relative_damping (got "
            f"{options.relative_damping}), not both."
        )
    for name in ("damping", "relative_damping"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, got {value}.")


def responses_of(
    options: InverseSettings, context: Context, meetings: int | None = None
) -> Responses:
    """The responses that an estimator's settings ask for.

    Args:
        meetings: training examples that each response will meet; None: all of them.
    """
    return EigenbasisResponses(options, context, meetings)


def last_interval(trajectory: Trajectory) -> tuple[int, int]:
    """The steps before the last checkpoint that have recorded statistics, else all of them."""
    with_examples = [
        interval
        for interval in sorted(trajectory.statistics, reverse=True)
        if any(float(block.examples) for block in trajectory.statistics[interval].values())
    ]
    return with_examples[0] if with_examples else (0, trajectory.last_step)


def decay_of(context: Context, kind: str) -> dict[str, Tensor]:
    """Weight decay of every parameter at the last step, by unit of curvature."""
    trajectory = context.trajectory
    rates = trajectory.steps.hyperparameters["weight_decay"][trajectory.last_step - 1]
    filled = {
        key: torch.full(fact.shape, float(rates[fact.group]), dtype=torch.float64)
        for key, fact in trajectory.facts.parameters.items()
    }
    matrices = {block.name: block.matrix(filled) for block in context.blocks}
    return {
        name: matrix.to(context.device, context.dtype)
        for name, matrix in unit_matrices(kind, matrices).items()
    }


class EigenbasisResponses:
    """Curvature of the last checkpoint in an eigenbasis, inverted eigenvalue by eigenvalue."""

    copies = 2

    def __init__(self, options: InverseSettings, context: Context, meetings: int | None) -> None:
        self.options, self.context, self.kind = options, context, options.curvature
        self.meetings = context.num_train if meetings is None else meetings
        self.values: dict[str, Response] = {}
        self.fit: CurvatureFit | RecordedFit = curvature_of(
            options.statistics,
            options.curvature,
            context,
            last_interval(context.trajectory),
            [context.trajectory.last_step],
            seed=options.seed,
            dense_side=options.dense_side,
        )
        given = options.relative_damping
        self.relative_damping = 0.1 if given is None else given
        self._fitted = False
        self._damped: dict[str, Spectrum] = {}

    def passes(self, start: int, stop: int) -> list[Pass]:
        first = [] if self._fitted else self.fit.passes()
        self._fitted = True
        step = self.context.trajectory.last_step
        solve = Pass("queries", step, lambda *_: None, self._solve(start, stop), rows=())
        return [*first, solve]

    def _solve(self, start: int, stop: int) -> Callable[[], None]:
        def begin() -> None:
            self.values = {}
            found = query_gradients(self.context, self.kind, start, stop, self.damped)
            for name, coordinates in found.items():
                spectrum = self.damped(name)
                coordinates /= spectrum.eigenvalues
                self.values[name] = Response(coordinates, spectrum, self.meetings)

        return begin

    def damped(self, name: str) -> Spectrum:
        """Curvature plus weight decay plus damping, on the device."""
        if name not in self._damped:
            spectrum = self.fit.spectra[name].to(self.context.device, self.context.dtype)
            damping: Any = self.options.damping
            if damping is None:
                damping = self.relative_damping * spectrum.eigenvalues.mean()
            damped = spectrum.shifted(decay_of(self.context, self.kind)[name] + damping)
            if not bool((damped.eigenvalues > 0).all()):
                raise ValueError(
                    f"The curvature of {name} is singular and damping is 0: the inverse does not "
                    "exist. Give a positive damping."
                )
            self._damped[name] = damped
        return self._damped[name]

    def dot(self, gradients: Mapping[str, Gradient]) -> Tensor:
        return dot(self.values, units(self.kind, gradients))

    def own(self, measured: Mapping[str, Gradient], trained: Mapping[str, Gradient]) -> Tensor:
        pairs = units(self.kind, measured), units(self.kind, trained)
        if measured is trained:
            pairs = pairs[1], pairs[1]  # the same objects tell that the two gradients are one
        parts = []
        for name, gradient in pairs[1].items():
            spectrum = self.damped(name)
            parts.append(paired(pairs[0][name], gradient, spectrum, 1 / spectrum.eigenvalues))
        return torch.stack(parts).sum(0)

    def provenance(self) -> dict[str, Any]:
        options, trajectory = self.options, self.context.trajectory
        damping = (
            {"absolute": options.damping}
            if options.damping is not None
            else {"relative to the layer's mean eigenvalue": self.relative_damping}
        )
        about = about_statistics(
            options.statistics, options.curvature, trajectory, [last_interval(trajectory)]
        )
        return {"damping": damping, **about}

    def notes(self) -> list[str]:
        return []
