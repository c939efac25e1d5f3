"""The responses of queries by a solver: (C + D) h = v for each query's gradient v."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tda_lightning.curvature import Products, as_matrices, unit_matrices
from tda_lightning.estimators.about import about_statistics
from tda_lightning.estimators.eigenbasis import (
    about_damping,
    absolute_damping,
    decay_of,
    fit_of,
    last_interval,
)
from tda_lightning.estimators.queries import Response, dot, query_gradients
from tda_lightning.gradients import Gradient
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.session.passes import Pass, Session
from tda_lightning.solvers import Problem, Solver, norms

if TYPE_CHECKING:
    from tda_lightning.estimators.responses import InverseSettings

_BLOCKS = "blocks"  # a kind for which units are the blocks


class SolverResponses:
    """Responses by one of ``tda_lightning.solvers``, on the parameters' own axes.

    The solver's work goes through the training set as it likes, so its pass visits numbers of
    steps instead of batches, in every process; products are shared between them.

    A relative damping (0.1 where none is given) multiplies the mean eigenvalue of the Gauss-Newton
    matrix over all parameters, its trace over their number, whatever the solver's curvature; for a
    solver by layer, each layer's mean eigenvalue of the empirical Fisher. Traces are those of
    sampled gradients, as in the fits.
    """

    kind = _BLOCKS
    knows_own = False

    def __init__(
        self, options: InverseSettings, solver: Solver, context: Session, meetings: int | None
    ) -> None:
        self.options, self.solver, self.context = options, solver, context
        self.meetings = context.num_train if meetings is None else meetings
        self.copies = solver.copies
        self.values: dict[str, Response] = {}
        self.absolute = absolute_damping(options, context.trajectory)
        self.fit = fit_of(options, context) if solver.preconditioned else None
        decay = decay_of(context, "exact")
        (row,) = decay.values()
        self.problem = Problem(
            context=context,
            products=Products(solver.curvature, context),
            decay=row.flatten(),
            damping=torch.full_like(row.flatten(), self.absolute or 0.0),
            spectra={},
            seed=options.seed,
        )
        self.steps = solver.steps(self.problem)
        self.residuals: list[float] = []
        self.solved = 0.0  # products for solutions, without those that check them
        self._notes: list[str] = []
        self._begun = False
        self._traces = {
            block.name: torch.zeros((), dtype=torch.float64, device=context.device)
            for block in context.blocks
        }

    def passes(self, start: int, stop: int) -> list[Pass]:
        first = [] if self._begun else self._first()
        self._begun = True
        title = f"{type(self.solver).__name__} for the queries"
        work = _Work(self, start, stop)
        step = self.context.trajectory.last_step
        rows = range(self.steps + 1)  # the last one for the residual
        solve = Pass(title, step, work.go, work.begin, work.end, rows=rows)
        return [*first, solve]

    def _first(self) -> list[Pass]:
        passes = [] if self.fit is None else self.fit.passes()
        if self.absolute is None:
            step = self.context.trajectory.last_step
            passes.append(
                Pass("mean eigenvalue", step, self._add_traces, None, self._finish_traces)
            )
        return passes

    def _add_traces(self, batch: Any, examples: Tensor, _: int) -> None:
        if self.solver.by_layer:
            found = self.context.train_gradients(batch, examples)
        else:
            seed = self.options.seed + self.context.trajectory.last_step
            found = self.context.fisher_gradients(batch, examples, seed)
        for name, gradient in found.blocks.items():
            self._traces[name] += gradient.weighted_squares(None, None, None).double().sum()

    def _finish_traces(self) -> None:
        given = self.options.relative_damping
        relative = 0.1 if given is None else given
        names = list(self._traces)
        traces = self.context.reduce(torch.stack(list(self._traces.values())))
        traces = relative * traces / self.context.num_train
        sizes = [block.size for block in self.context.blocks]
        if not self.solver.by_layer:
            traces = traces.sum() * torch.tensor(sizes).to(traces) / sum(sizes)
        parts = [
            torch.full((size,), float(trace) / size)
            for size, trace in zip(sizes, traces, strict=True)
        ]
        assert names == [block.name for block in self.context.blocks]
        self.problem.damping = torch.cat(parts).to(self.problem.decay)

    def run(self, vectors: Tensor) -> Generator[None, None, Tensor]:
        """Solve, and see how well: one unit of work at a time."""
        if self.fit is not None:
            place = (self.context.device, self.context.dtype)
            self.problem.spectra = {n: s.to(*place) for n, s in self.fit.spectra.items()}
        if not bool(vectors.isfinite().all()):
            raise NonFiniteError(
                "The gradient of a query's measurement is not finite: nothing can be solved for it."
            )
        before = self.problem.products.counted
        solution = yield from self.solver.solve(self.problem, vectors)
        self.solved += self.problem.products.counted - before
        self.residuals += self._residuals(vectors, solution)
        return solution

    def _residuals(self, vectors: Tensor, solution: Tensor) -> list[float]:
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

    def dot(self, gradients: Mapping[str, Gradient]) -> Tensor:
        return dot(self.values, gradients)

    def own(self, measured: Mapping[str, Gradient], trained: Mapping[str, Gradient]) -> Tensor:
        raise NotImplementedError("A solver has no self-influence: knows_own is False.")

    def provenance(self) -> dict[str, Any]:
        solver, problem = self.solver, self.problem
        found = sorted(self.residuals)
        residual = {"max": found[-1], "median": found[len(found) // 2]} if found else None
        mean = "each layer's mean eigenvalue" if solver.by_layer else "the mean eigenvalue"
        statistics: dict[str, Any] = {}
        if self.fit is not None:
            options, trajectory = self.options, self.context.trajectory
            spans = [last_interval(trajectory)]
            statistics = about_statistics(options.statistics, options.curvature, trajectory, spans)
        return {
            **statistics,
            "curvature": f"{solver.curvature}, by products",
            "fisher": None,
            "damping": about_damping(self.options, self.context.trajectory, mean),
            "solver": {
                "name": type(solver).__name__,
                "settings": asdict(solver),  # type: ignore[call-overload]
                "damping": _range(problem.damping),
                "products": round(self.solved, 2),
                "products_by": problem.products.way,
                "tolerance": solver.tolerance,
                "relative_residual": residual,
                "reached": self._reached,
                **problem.found,
            },
        }

    @property
    def _reached(self) -> bool | None:
        """Whether every query came as close as asked for; None where nothing was."""
        tolerance = self.solver.tolerance
        if tolerance is None or not self.residuals:
            return None
        return all(residual <= tolerance for residual in self.residuals)

    def notes(self) -> list[str]:
        if self._reached is not False:
            return self._notes
        tolerance = self.solver.tolerance
        assert tolerance is not None
        above = [residual for residual in self.residuals if not residual <= tolerance]
        rounded = self.problem.found.get("ended_by") == "rounding"
        more = "raise the solver's number of steps or the damping"
        damp = "rounding ended the iteration, so raise the damping"
        return [
            f"{type(self.solver).__name__} did not reach its tolerance: the relative residual of "
            f"{len(above)} of {len(self.residuals)} queries is above {tolerance:g}, up to "
            f"{max(above):.3g}. Their scores are not those of the inverse: "
            f"{damp if rounded else more}."
        ]


class _Work:
    """The pass that solves for one round of queries."""

    def __init__(self, responses: SolverResponses, start: int, stop: int) -> None:
        self.responses, self.start, self.stop = responses, start, stop

    def begin(self) -> None:
        context = self.responses.context
        self.responses.values = {}
        found = query_gradients(context, _BLOCKS, self.start, self.stop)
        (rows,) = unit_matrices("exact", found).values()
        self.vectors = rows[:, 0, 0]
        self.solution: Tensor | None = None
        self._work = self.responses.run(self.vectors)

    def go(self, batch: Any, row: Tensor, position: int) -> None:
        if self.solution is not None:
            return  # arrived before the last step that was allowed
        try:
            next(self._work)
        except StopIteration as done:
            self.solution = done.value

    def end(self) -> None:
        responses = self.responses
        if self.solution is None:
            # Only a rehearsal stops before the end.
            assert True
            self._work.close()
            self.solution = self.vectors
        matrices = as_matrices(responses.context.blocks, self.solution)
        responses.values = {
            name: Response(matrix.contiguous(), None, responses.meetings)
            for name, matrix in matrices.items()
        }
        del self.vectors, self._work


def _range(values: Tensor) -> float | list[float]:
    """The one number, or the least and the largest."""
    least, largest = float(values.min()), float(values.max())
    return least if least == largest else [least, largest]
