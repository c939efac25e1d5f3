"""SOURCE with the exact Gauss-Newton matrix of each segment, which is only ever multiplied with.

The averaged order (``averaged.py``) with another way to the same two functions of curvature: they
are computed for the queries of a round, from products alone (``matrix_functions.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.curvature import Products, as_matrices
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.estimators.queries import Response, directions, dot
from tda_lightning.estimators.source.matrix_functions import segment_functions
from tda_lightning.estimators.source.segments import Adjoint, Crossing, FittedSegment
from tda_lightning.records.provenance import MatrixFreeRecord
from tda_lightning.session.session import Session
from tda_lightning.solvers.problem import check_limits

BLOCKS = ("layer", "full")


@dataclass(frozen=True)
class MatrixFree:
    """The settings of ``Source(curvature="matrix_free")``.

    Attributes:
        blocks: ``full`` (None) or ``layer``: without the coupling between layers.
        tolerance: relative error of a segment's functions of curvature.
        max_products: the most for each query and segment.

    Raises:
        ValueError: impossible settings.
    """

    blocks: str | None = None
    tolerance: float = 1e-3
    max_products: int = 100

    def __post_init__(self) -> None:
        check_limits(tolerance=self.tolerance, max_products=self.max_products)
        if self.blocks not in (None, *BLOCKS):
            raise ValueError(
                f"blocks must be one of {', '.join(BLOCKS)} or null (None), got {self.blocks!r}."
            )


class MatrixFreeOrder:
    """Crosses segments with products, and keeps account of them.

    All parameters are one unit, as for ``exact``.
    """

    def __init__(self, settings: MatrixFree, session: Session) -> None:
        by_layer = settings.blocks == "layer"
        self.settings = settings
        self.products = Products("gauss_newton", session, by_block=by_layer)
        sizes = [block.size for block in session.blocks]
        self.sizes = sizes if by_layer else [sum(sizes)]
        # More vectors than parameters span no larger Krylov space.
        self.max_products = min(settings.max_products, max(self.sizes))
        self._errors: list[Tensor] = []  # of every query, for each round and segment
        self._counts: list[Tensor] = []  # of products, likewise
        self._walks = 0

    @property
    def copies(self) -> int:
        """Dense gradients that a query takes: the basis of its Krylov space, and what is computed
        with."""
        return self.max_products + 8

    def cross(
        self, segments: Sequence[FittedSegment], number: int, adjoint: Adjoint, first_query: int
    ) -> Crossing:
        """Score a segment's checkpoints and carry the adjoint of the queries to its start."""
        segment = segments[number]
        session, geometry, steps = segment.session, segment.geometry, segment.steps.checkpoints
        vectors = geometry.enter(WHOLE, adjoint[WHOLE])[0, :, 0, 0]
        basis_bytes = self.max_products * vectors.numel() * vectors.dtype.itemsize
        functions = segment_functions(
            lambda rows: self._multiply(segment, rows),
            vectors,
            self.sizes,
            geometry.time,
            session.loop(
                f"{segment.title}: functions of curvature",
                range(1, self.max_products + 1),
                memory=basis_bytes if session.device.type == "cpu" else 0,
            ),
            tolerance=self.settings.tolerance,
            max_products=self.max_products,
            carry=segment.goes_back,
        )
        self._errors.append(functions.errors)
        self._counts.append(functions.products)
        carried = {}
        if functions.left is not None:
            left = functions.left[None, :, None, None]
            carried = {WHOLE: geometry.leave(WHOLE, left, adjoint[WHOLE])}
        response = geometry.on_parameters(WHOLE, functions.response[:, None, None])[:, 0, 0]
        meetings = session.num_train * len(steps)
        responses = {
            name: Response(matrix.contiguous(), None, meetings)
            for name, matrix in as_matrices(session.blocks, response).items()
        }
        tokens = directions(session, responses) if session.by_token else {}
        for step in steps:
            for batch in session.walk_columns(f"{segment.title}: scores, step {step}", step):
                values = dot(responses, batch.gradients) / meetings
                session.add(number, batch, values, first_query, used=segment.used)
                if session.by_token:
                    session.add_terms(batch, tokens, first_query, 1 / meetings, segment.used)
        return Crossing(carried, {})

    def _multiply(self, segment: FittedSegment, vectors: Tensor) -> Tensor:
        """(h G h + decay) times rows, with G the mean over the segment's checkpoints."""
        geometry, checkpoints = segment.geometry, segment.steps.checkpoints
        decay = geometry.decay[WHOLE].flatten()
        scale = geometry.scale.get(WHOLE, torch.ones_like(decay)).flatten()
        total = torch.zeros_like(vectors)
        self.products.used = segment.used
        for step in checkpoints:
            segment.session.load(step)
            total += self.products.over_training_set(scale * vectors)
            self._walks += 1
        return scale * total / len(checkpoints) + decay * vectors

    def record(self) -> MatrixFreeRecord:
        """What the products have led to, for the provenance."""
        errors, products = torch.cat(self._errors), torch.cat(self._counts)
        return {
            "blocks": self.settings.blocks or "full",
            "products": int(products.sum()),
            "products_per_query_and_segment": {
                "max": int(products.max()),
                "mean": round(float(products.double().mean()), 2),
            },
            "products_by": self.products.way,
            "walks_over_training_set": self._walks,
            "tolerance": self.settings.tolerance,
            "relative_error": {"max": float(errors.max()), "median": float(errors.median())},
            "reached": bool((errors <= self.settings.tolerance).all()),
        }

    def notes(self) -> list[str]:
        """What a reader should know of the errors."""
        errors, tolerance = torch.cat(self._errors), self.settings.tolerance
        above = errors[~(errors <= tolerance)]
        if len(above) == 0:
            return []
        return [
            f"The tolerance was not reached: after {self.max_products} products, {len(above)} of "
            f"{len(errors)} functions of curvature (one for each query and segment) may be off by "
            f"more than {tolerance:g} of their length, by up to {float(above.max()):.3g}. Raise "
            "max_products, or cut the run into more segments."
        ]
