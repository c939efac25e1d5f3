"""The inverse curvature of influence functions: (H + (lambda + damping) I)^-1 for the queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from tda_lightning.estimators.inverse_eigenbasis import EigenbasisInverse
from tda_lightning.estimators.inverse_settings import InverseSettings
from tda_lightning.estimators.inverse_solver import SolverInverse
from tda_lightning.estimators.queries import Response
from tda_lightning.gradients import Gradient
from tda_lightning.records.provenance import Provenance
from tda_lightning.session.session import Session


class Inverse(Protocol):
    """An inverse curvature, fitted once for an attribution.

    Attributes:
        kind: of the units that responses are by, for ``units(kind, gradients)``.
        query_bytes: that each query takes in memory at a time.
        knows_own: whether ``own`` is there; otherwise it would take a solve for each example.
    """

    kind: str
    query_bytes: int
    knows_own: bool

    def responses(self, first: int, last: int, meetings: int) -> dict[str, Response]:
        """(H + (lambda + damping) I)^-1 grad m_q of the queries ``first`` to ``last`` by unit,
        without the 1/N of the scores.

        Args:
            meetings: training examples that each response will be multiplied with.
        """

    def own(self, measured: Mapping[str, Gradient], trained: Mapping[str, Gradient]) -> Tensor:
        """Each example's response to itself, [batch], from the gradients by block of its
        measurement and its training loss."""

    def provenance(self) -> Provenance:
        """How it is made, with notes; complete when all queries have been asked."""


def fit_inverse(settings: InverseSettings, session: Session) -> Inverse:
    """The inverse curvature that an estimator's settings ask for, fitted."""
    if settings.solver is None:
        return EigenbasisInverse(settings, session)
    return SolverInverse(settings, settings.solver, session)
