"""The eigenbasis solve: what the queries ask for by a curvature that is held as eigenvalues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tda_lightning.curvature import (
    CurvatureFit,
    RecordedFit,
    Spectrum,
    curvature_of,
    unit_matrices,
    units,
)
from tda_lightning.estimators.about import about_statistics
from tda_lightning.estimators.pairs import paired
from tda_lightning.estimators.queries import Response, dot, query_gradients
from tda_lightning.gradients import Gradient
from tda_lightning.optimizers import applied_rates, rule_if_known, weight_decay
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.session.passes import Pass, Session

if TYPE_CHECKING:
    from tda_lightning.estimators.responses import InverseSettings


def last_interval(trajectory: Trajectory) -> tuple[int, int]:
    """The steps before the last checkpoint that have recorded statistics, else all of them."""
    with_examples = [
        interval
        for interval in sorted(trajectory.statistics, reverse=True)
        if any(float(block.examples) for block in trajectory.statistics[interval].values())
    ]
    return with_examples[0] if with_examples else (0, trajectory.last_step)


def fit_of(options: InverseSettings, context: Session) -> CurvatureFit | RecordedFit:
    """The curvature of the last checkpoint in an eigenbasis."""
    return curvature_of(
        options.statistics,
        options.curvature,
        context,
        last_interval(context.trajectory),
        [context.trajectory.last_step],
        seed=options.seed,
        dense_side=options.dense_side,
    )


def absolute_damping(options: InverseSettings, trajectory: Trajectory) -> float | None:
    """The damping as a number; None where it is relative to the curvature.

    Raises:
        UnsupportedTrainingError: ``segment`` for a run that was not trained by SGD.
    """
    if options.damping != "segment":
        return options.damping  # type: ignore[return-value]
    rule = rule_if_known(trajectory)
    if rule is None or not rule.linear:
        raise UnsupportedTrainingError(
            "damping='segment' is 1 / (eta T) of plain gradient descent, and the run was trained "
            f"with {trajectory.facts.optimizer}, whose steps are not in proportion to gradients. "
            "Give a number, or relative_damping."
        )
    time = float(applied_rates(trajectory, slice(None)).sum(0).max())
    if time <= 0:
        raise UnsupportedTrainingError("damping='segment' is 1 / (eta T), and all rates are 0.")
    return 1 / time


def about_damping(options: InverseSettings, trajectory: Trajectory, whole: str) -> dict[str, Any]:
    """The damping in words; ``whole``: what a relative one is relative to."""
    absolute = absolute_damping(options, trajectory)
    if absolute is not None:
        return {"absolute": absolute}
    given = options.relative_damping
    return {f"relative to {whole}": 0.1 if given is None else given}


def decay_of(context: Session, kind: str) -> dict[str, Tensor]:
    """Weight decay of every parameter at the last step, by unit of curvature."""
    trajectory = context.trajectory
    last = trajectory.last_step
    rates = weight_decay(trajectory, slice(last - 1, last))[0]
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
    knows_own = True

    def __init__(self, options: InverseSettings, context: Session, meetings: int | None) -> None:
        self.options, self.context, self.kind = options, context, options.curvature
        self.meetings = context.num_train if meetings is None else meetings
        self.values: dict[str, Response] = {}
        self.fit = fit_of(options, context)
        self.absolute = absolute_damping(options, context.trajectory)
        given = options.relative_damping
        self.relative_damping = 0.1 if given is None else given
        self._fitted = False
        self._damped: dict[str, Spectrum] = {}

    def passes(self, start: int, stop: int) -> list[Pass]:
        first = [] if self._fitted else self.fit.passes()
        self._fitted = True
        step = self.context.trajectory.last_step
        solve = Pass("queries", step, lambda *_: None, self._solve(start, stop), rows=range(1))
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
            damping: Any = self.absolute
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
        about = about_statistics(
            options.statistics, options.curvature, trajectory, [last_interval(trajectory)]
        )
        damping = about_damping(options, trajectory, "the layer's mean eigenvalue")
        return {"damping": damping, **about}

    def notes(self) -> list[str]:
        return []
