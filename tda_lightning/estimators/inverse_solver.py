"""The inverse of a curvature that is only ever multiplied with: a solver finds (C + D) h = v for
each query's gradient v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from tda_lightning.curvature import Products, as_matrices, statistics_provenance, unit_matrices
from tda_lightning.estimators.inverse_settings import (
    InverseSettings,
    absolute_damping,
    damping_record,
    decay_by_unit,
    final_curvature,
    last_interval,
    relative_damping,
)
from tda_lightning.estimators.queries import Response, query_gradients
from tda_lightning.gradients import Gradient
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.records.provenance import Provenance
from tda_lightning.session.session import Session, Span
from tda_lightning.solvers import Problem, Solver, norms


class SolverInverse:
    """Responses by one of ``tda_lightning.solvers``, on the parameters' own axes.

    A relative damping (0.1 where none is given) multiplies the mean eigenvalue of the Gauss-Newton
    matrix over all parameters, its trace over their number, whatever the solver's curvature; for a
    solver by layer, each layer's mean eigenvalue of the empirical Fisher. Traces are those of
    sampled gradients, as in the fits.
    """

    kind = "blocks"
    knows_own = False

    def __init__(self, settings: InverseSettings, solver: Solver, session: Session) -> None:
        self.settings, self.solver, self.session = settings, solver, session
        self.query_bytes = session.gradient_bytes(solver.copies)
        spectra = final_curvature(settings, session) if solver.preconditioned else {}
        (decay,) = decay_by_unit(session, "exact").values()
        absolute = absolute_damping(settings, session.trajectory)
        used = (0, session.trajectory.last_step)
        damping = self._relative_damping(used) if absolute is None else absolute
        self.problem = Problem(
            session=session,
            products=Products(solver.curvature, session, used=used),
            decay=decay.flatten(),
            damping=torch.zeros_like(decay.flatten()) + damping,
            spectra=spectra,
            seed=settings.seed,
            used=used,
        )
        self.residuals: list[float] = []
        self.products = 0.0  # for solutions, without those that check them
        self._notes: list[str] = []

    def _relative_damping(self, used: Span) -> Tensor:
        """A multiple of the mean eigenvalue, [parameters]."""
        session, by_layer = self.session, self.solver.by_layer
        step = session.trajectory.last_step
        sizes = torch.tensor([block.size for block in session.blocks], device=session.device)
        traces = torch.zeros(len(sizes), dtype=torch.float64, device=session.device)
        for batch in session.walk("mean eigenvalue", step):
            weights = batch.curvature_weights(used)
            for _ in session.losses.each_draw():
                gradients = batch.gradients
                if not by_layer:
                    seed = self.settings.seed + step
                    gradients = session.fisher_gradients(batch.data, batch.examples, seed).blocks
                for number, block in enumerate(session.blocks):
                    squares = gradients[block.name].weighted_squares(None, None, None)
                    squares = squares if weights is None else squares * weights
                    traces[number] += squares.double().sum()
        means = session.reduce(traces) / (session.num_train * session.draws)
        means = means / sizes if by_layer else (means.sum() / sizes.sum()).expand(len(sizes))
        means = relative_damping(self.settings) * means
        return means.repeat_interleave(sizes).to(session.dtype)

    def responses(self, first: int, last: int, meetings: int) -> dict[str, Response]:
        """See :class:`~tda_lightning.estimators.inverse.Inverse`."""
        self.session.load(self.session.trajectory.last_step)
        gradients = query_gradients(self.session, self.kind, first, last)
        (rows,) = unit_matrices("exact", gradients).values()
        vectors = rows[:, 0, 0]
        if not bool(vectors.isfinite().all()):
            raise NonFiniteError(
                "The gradient of a query's measurement is not finite: nothing can be solved for it."
            )
        before = self.problem.products.counted
        solution = self.solver.solve(self.problem, vectors)
        self.products += self.problem.products.counted - before
        self.residuals += self._residuals(vectors, solution)
        matrices = as_matrices(self.session.blocks, solution)
        return {
            name: Response(matrix.contiguous(), None, meetings) for name, matrix in matrices.items()
        }

    def _residuals(self, vectors: Tensor, solution: Tensor) -> list[float]:
        """Lengths of v - (C + D) h relative to that of v."""
        try:
            rest = vectors - self.problem.apply(solution)
        except ValueError as error:
            if self.solver.tolerance is not None:
                raise
            # A closed form needs no products, and may be asked for where there are none.
            self._notes = [f"The residual of the solver is not known: {error}"]
            return []
        lengths = norms(vectors)
        return (norms(rest) / lengths.where(lengths > 0, 1)).tolist()

    def own(self, measured: Mapping[str, Gradient], trained: Mapping[str, Gradient]) -> Tensor:
        """Not offered: it would take a solve for each training example."""
        raise NotImplementedError(
            "Self-influence would take a solve for each training example. Invert without a solver."
        )

    def provenance(self) -> Provenance:
        """See :class:`~tda_lightning.estimators.inverse.Inverse`."""
        settings, solver, trajectory = self.settings, self.solver, self.session.trajectory
        residuals = sorted(self.residuals)
        mean = "each layer's mean eigenvalue" if solver.by_layer else "the mean eigenvalue"
        statistics: Provenance = {}
        if solver.preconditioned:
            spans = [last_interval(trajectory)]
            statistics = statistics_provenance(
                settings.statistics, settings.curvature, trajectory, spans
            )
        return {
            **statistics,
            "curvature": f"{solver.curvature}, by products",
            "fisher": None,
            "damping": damping_record(settings, trajectory, mean),
            "solver": {
                **self.problem.record,
                "name": type(solver).__name__,
                "settings": asdict(solver),  # type: ignore[call-overload]
                "damping": _range(self.problem.damping),
                "products": round(self.products, 2),
                "products_by": self.problem.products.way,
                "tolerance": solver.tolerance,
                "relative_residual": {
                    "max": residuals[-1],
                    "median": residuals[len(residuals) // 2],
                }
                if residuals
                else None,
                "reached": self._reached,
            },
            "notes": self._notes + self._residual_notes(),
        }

    @property
    def _reached(self) -> bool | None:
        """Whether every query came as close as asked for; None where nothing was."""
        tolerance = self.solver.tolerance
        if tolerance is None or not self.residuals:
            return None
        return all(residual <= tolerance for residual in self.residuals)

    def _residual_notes(self) -> list[str]:
        tolerance = self.solver.tolerance
        if tolerance is None or self._reached is not False:
            return []
        above = [residual for residual in self.residuals if not residual <= tolerance]
        advice = "raise the solver's number of steps or the damping"
        if self.problem.record.get("ended_by") == "rounding":
            advice = "rounding ended the iteration, so raise the damping"
        return [
            f"{type(self.solver).__name__} did not reach its tolerance: the relative residual of "
            f"{len(above)} of {len(self.residuals)} queries is above {tolerance:g}, up to "
            f"{max(above):.3g}. Their scores are not those of the inverse: {advice}."
        ]


def _range(values: Tensor) -> float | list[float]:
    """The one number, or the least and the largest."""
    least, largest = float(values.min()), float(values.max())
    return least if least == largest else [least, largest]
