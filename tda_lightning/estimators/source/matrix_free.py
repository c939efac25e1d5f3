"""SOURCE with the exact Gauss-Newton matrix of each segment, which is only ever multiplied with.

The averaged order (``averaged.py``) with another way to the same two functions of curvature: per
round of queries and segment, last segment first, one pass finds what the segment takes in and what
it leaves of every query (``matrix_functions.py``); the passes that score follow.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tda_lightning.curvature import Products, as_matrices
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.estimators.queries import Response, dot, query_gradients, query_rounds
from tda_lightning.estimators.source.geometry import Geometry, segment_geometry
from tda_lightning.estimators.source.matrix_functions import (
    SegmentFunctions,
    Work,
    segment_functions,
)
from tda_lightning.records.trajectory import Segment
from tda_lightning.session.passes import Pass, Plan, Session

if TYPE_CHECKING:
    from tda_lightning.estimators.source.estimator import Source

_NO_SELF = (
    "No self-influence: every training example would need products of its own. Ask for examples as "
    "queries, or use another curvature."
)


@dataclass
class MatrixFreeRun:
    """One attribution: for each round of queries, functions of curvature and scores by turns.

    All parameters are one unit, as for ``exact``: the adjoints of the queries are
    [query, 1, 1, parameters].
    """

    options: Source
    context: Session
    segments: tuple[Segment, ...] = field(init=False)

    def __post_init__(self) -> None:
        options, context = self.options, self.context
        self.segments = context.trajectory.segments(options.cuts())
        self.geometries = [segment_geometry(context, s, "exact") for s in self.segments]
        self.by_layer = options.blocks == "layer"
        self.products = Products("gauss_newton", context, by_block=self.by_layer)
        sizes = [block.size for block in context.blocks]
        self.sizes = sizes if self.by_layer else [sum(sizes)]
        # A Krylov space is whole at last.
        self.most = min(options.max_products, max(self.sizes))
        self.adjoint = torch.empty(0)
        self.responses: dict[str, Response] = {}
        self.errors = torch.empty(0, dtype=torch.float64)  # of every query and segment
        self.taken = torch.empty(0, dtype=torch.int64)  # products of every query and segment
        self.walks = 0

    def passes(self) -> list[Pass]:
        passes = []
        # The basis of each query's Krylov space, and what is computed with.
        for start, stop in query_rounds(self.context, self.most + 8):
            for number in reversed(range(len(self.segments))):
                work = _Functions(self, number, start, stop)
                checkpoints = self.segments[number].checkpoints
                passes.append(
                    Pass(
                        f"segment {number + 1}: functions of curvature",
                        checkpoints[0],
                        work.go,
                        work.begin,
                        work.end,
                        rows=range(self.most * len(checkpoints) + 1),
                        holds=self._basis_bytes(stop - start),
                    )
                )
                for step in checkpoints:
                    title = f"segment {number + 1}: scores, step {step}"
                    passes.append(Pass(title, step, self._score(number, start)))
        return passes

    def _basis_bytes(self, queries: int) -> int:
        """What the bases of so many queries take of main memory in the end."""
        if self.context.device.type != "cpu":
            return 0
        return self.most * queries * sum(self.sizes) * self.context.dtype.itemsize

    def multiply(self, number: int, vectors: Tensor) -> Work:
        """(h G h + decay) times rows, with G the mean over the checkpoints of segment ``number``:
        one unit of work for each."""
        geometry, checkpoints = self.geometries[number], self.segments[number].checkpoints
        decay = geometry.decay[WHOLE].flatten()
        scale = geometry.scale.get(WHOLE, torch.ones_like(decay)).flatten()
        total = torch.zeros_like(vectors)
        for step in checkpoints:
            self.context.load(step)
            total += self.products.over_training_set(scale * vectors)
            self.walks += 1
            yield
        return scale * total / len(checkpoints) + decay * vectors

    def _score(self, number: int, first_query: int) -> Any:
        share = 1 / (self.context.num_train * len(self.segments[number].checkpoints))

        def accumulate(batch: Any, examples: Tensor, _: int) -> None:
            found = self.context.train_gradients(batch, examples)
            values = dot(self.responses, found.blocks) * share
            self.context.scores.add(number, examples, values, first_query)

        return accumulate

    def report_to(self, plan: Plan) -> None:
        """Have the last pass tell ``plan`` what was found."""
        if self.context.self_influence:
            plan.notes.append(_NO_SELF)
        last = plan.passes[-1]
        assert last.end is None
        last.end = self._finish(plan)

    def _finish(self, plan: Plan) -> Callable[[], None]:
        def end() -> None:
            tolerance, errors = self.options.tolerance, self.errors
            above = errors[~(errors <= tolerance)]
            plan.provenance["matrix_free"] = {
                "blocks": "layer" if self.by_layer else "full",
                "products": int(self.taken.sum()),
                "products_per_query_and_segment": {
                    "max": int(self.taken.max()),
                    "mean": round(float(self.taken.double().mean()), 2),
                },
                "products_by": self.products.way,
                "walks_over_training_set": self.walks,
                "tolerance": tolerance,
                "relative_error": {"max": float(errors.max()), "median": float(errors.median())},
                "reached": len(above) == 0,
            }
            if len(above) > 0:
                plan.notes.append(
                    f"The tolerance was not reached: after {self.most} products, {len(above)} of "
                    f"{len(errors)} functions of curvature (one for each query and segment) may "
                    f"be off by more than {tolerance:g} of their length, by up to "
                    f"{float(above.max()):.3g}. Raise max_products, or cut the run into more "
                    "segments."
                )

        return end


class _Functions:
    """The pass that takes some queries back through a segment."""

    def __init__(self, run: MatrixFreeRun, number: int, start: int, stop: int) -> None:
        self.run, self.number, self.start, self.stop = run, number, start, stop

    @property
    def _geometry(self) -> Geometry:
        return self.run.geometries[self.number]

    def begin(self) -> None:
        run, options = self.run, self.run.options
        run.responses = {}
        if self.number == len(run.segments) - 1:
            run.context.load(run.context.trajectory.last_step)
            found = query_gradients(run.context, "exact", self.start, self.stop)
            run.adjoint = found[WHOLE]
        vectors = self._geometry.enter(WHOLE, run.adjoint)[:, 0, 0]
        self.found: SegmentFunctions | None = None
        self._work: Generator[None, None, SegmentFunctions] = segment_functions(
            lambda rows: run.multiply(self.number, rows),
            vectors,
            run.sizes,
            self._geometry.time,
            tolerance=options.tolerance,
            max_products=run.most,
            carry=self.number > 0,
        )

    def go(self, batch: Any, row: Tensor, position: int) -> None:
        if self.found is not None:
            return  # all queries were done before the last product that was allowed
        try:
            next(self._work)
        except StopIteration as done:
            self.found = done.value

    def end(self) -> None:
        run, geometry = self.run, self._geometry
        self._work.close()
        if self.found is None:
            # Only a rehearsal stops before the end: any vectors will do.
            assert True
            count = self.stop - self.start
            vectors = run.adjoint[:, 0, 0]
            zero = torch.zeros(count, dtype=torch.float64)
            self.found = SegmentFunctions(vectors, vectors, zero, zero.to(torch.int64))
        found = self.found
        run.errors = torch.cat([run.errors, found.errors])
        run.taken = torch.cat([run.taken, found.products])
        response = geometry.enter(WHOLE, found.response[:, None, None])
        matrices = as_matrices(run.context.blocks, response[:, 0, 0])
        meetings = run.context.num_train * len(run.segments[self.number].checkpoints)
        run.responses = {
            name: Response(matrix.contiguous(), None, meetings) for name, matrix in matrices.items()
        }
        if found.left is not None:
            run.adjoint = geometry.leave(WHOLE, found.left[:, None, None], run.adjoint)
        del self.found, self._work
