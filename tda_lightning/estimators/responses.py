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

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from tda_lightning.curvature import check_dense_side, check_kind, check_statistics
from tda_lightning.estimators.eigenbasis import EigenbasisResponses
from tda_lightning.estimators.queries import Response
from tda_lightning.estimators.solved import SolverResponses
from tda_lightning.gradients import Gradient
from tda_lightning.session.passes import Pass, Session
from tda_lightning.solvers import Solver


class InverseSettings(Protocol):
    """The settings of an estimator that determine its inverse curvature; see
    :class:`~tda_lightning.estimators.InfluenceFunction` for what they mean."""

    curvature: str
    damping: float | str | None
    relative_damping: float | None
    statistics: str
    dense_side: int | None
    seed: int
    solver: Solver | None


class Responses(Protocol):
    """The inverse-curvature responses of the queries of one attribution.

    Attributes:
        kind: of the units that ``values`` are by, for ``units(kind, gradients)``.
        copies: dense gradients that each query takes in memory at a time.
        knows_own: whether ``own`` is there; otherwise it would take a solve for each example.
        values: of the queries of the round under way.
    """

    kind: str
    copies: int
    knows_own: bool
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
    if isinstance(options.damping, str) and options.damping != "segment":
        raise ValueError(
            f"damping must be a number, 'segment' (1 over the sum of the applied rates) or null "
            f"(None), got {options.damping!r}."
        )
    if options.solver is not None and not callable(getattr(options.solver, "solve", None)):
        raise ValueError(
            "solver must be one of tda_lightning.solvers (on the command line solver=cg and the "
            f"like) or null (None), got {options.solver!r}."
        )
    for name in ("damping", "relative_damping"):
        value = getattr(options, name)
        if isinstance(value, (int, float)) and value < 0:
            raise ValueError(f"{name} must not be negative, got {value}.")


def responses_of(
    options: InverseSettings, context: Session, meetings: int | None = None
) -> Responses:
    """The responses that an estimator's settings ask for.

    Args:
        meetings: training examples that each response will meet; None: all of them.
    """
    if options.solver is None:
        return EigenbasisResponses(options, context, meetings)
    return SolverResponses(options, options.solver, context, meetings)
