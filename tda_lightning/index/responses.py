r"""An estimator's scores as inner products of what queries ask with what training examples offer.

.. math::
    s_{qn} = \frac1N \sum_t \langle r_{tq},\; v_{tn}\, g_{tn} \rangle

A *term* t is a stretch of training: a checkpoint of TracIn, a segment of SOURCE, the whole run of
an influence function. :math:`g_{tn}` is example n's gradient, averaged over the term's checkpoints,
:math:`v_{tn}` how much the term used it (docs/methods.md, "Uneven use"), and :math:`r_{tq}` the
query's response: what the estimator multiplies gradients with. An index stores what depends on the
example alone, and compares it with the responses of queries that nobody knew when it was built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tda_lightning.curvature import as_matrices
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.estimators import Estimator, InfluenceFunction, Source, TracIn
from tda_lightning.estimators.inverse import Inverse, fit_inverse
from tda_lightning.estimators.source import averaged
from tda_lightning.estimators.source.coupling import entered, final_adjoint
from tda_lightning.estimators.source.estimator import MATRIX_FREE, alone
from tda_lightning.estimators.source.fitted_stage import FittedStage
from tda_lightning.estimators.tracin import checkpoint_intervals, rates_by_block
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.replay.recorded_draws import RecordedDraws
from tda_lightning.session.session import Session, Span

# What queries ask of a term's examples: [query, groups, rows, columns] by block.
Responses = dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """A stretch of training whose examples are compared with queries.

    Attributes:
        steps: the checkpoints that gradients are averaged over.
        used: the steps whose use of examples weighs them.
    """

    steps: tuple[int, ...]
    used: Span


class Responder(Protocol):
    """An estimator whose scores are inner products, fitted to a run.

    Attributes:
        terms: of the sum.
        query_bytes: that each query takes in memory at a time.
    """

    terms: list[Term]
    query_bytes: int

    def responses(self, first: int, last: int) -> Iterator[tuple[int, Responses]]:
        """The number of each term, with the responses of the session's queries ``first`` to
        ``last``, without the 1/N of the scores."""


def responder_of(estimator: Estimator, session: Session) -> Responder:
    """The estimator's responses, with its curvature fitted or taken from the cache.

    Raises:
        UnsupportedTrainingError: its scores are not inner products of this form.
    """
    if type(estimator) is TracIn:
        return _TracInResponses(session)
    if type(estimator) is InfluenceFunction:
        return _InfluenceResponses(estimator, session)
    if type(estimator) is Source:
        return _SourceResponses(estimator, session)
    raise UnsupportedTrainingError(
        "An index holds the gradients that queries are compared with: expected TracIn, "
        f"InfluenceFunction or Source(order='average'), got {type(estimator).__name__}. Attribute "
        "with it directly, AttributionModule.attribute(...)."
    )


class _TracInResponses:
    """Measurement gradients at every checkpoint, times the sum of its applied rates."""

    def __init__(self, session: Session) -> None:
        if RecordedDraws.of(session) is not None:
            raise UnsupportedTrainingError(
                "TracIn of a loss that draws random numbers compares the gradients of the run's "
                "own draws, which an index does not hold. Use InfluenceFunction or Source."
            )
        self.session = session
        self.intervals = checkpoint_intervals(session)
        self.terms = [Term((step,), (start, step)) for start, step in self.intervals]
        self.query_bytes = session.gradient_bytes(copies=2)

    def responses(self, first: int, last: int) -> Iterator[tuple[int, Responses]]:
        """See :class:`Responder`."""
        for number, (start, step) in enumerate(self.intervals):
            self.session.load(step)
            weights = rates_by_block(self.session, start, step)
            yield number, self.session.query_gradients(first, last).scaled(weights).dense()


class _InfluenceResponses:
    """Measurement gradients times the inverse curvature of the last checkpoint."""

    def __init__(self, estimator: InfluenceFunction, session: Session) -> None:
        step = session.trajectory.last_step
        self.session = session
        self.inverse: Inverse = fit_inverse(estimator, session)
        self.terms = [Term((step,), (0, step))]
        self.query_bytes = self.inverse.query_bytes + session.gradient_bytes(copies=1)

    def responses(self, first: int, last: int) -> Iterator[tuple[int, Responses]]:
        """See :class:`Responder`."""
        found = self.inverse.responses(first, last, self.session.num_train)
        yield 0, _by_block(self.session, {name: own.lifted() for name, own in found.items()})


class _SourceResponses:
    """Measurement gradients, carried back through the segments."""

    def __init__(self, estimator: Source, session: Session) -> None:
        if estimator.order != "average" or estimator.curvature == MATRIX_FREE:
            raise UnsupportedTrainingError(
                "An index holds one gradient of each example for each segment: expected "
                "Source(order='average') with curvature in an eigenbasis, got "
                f"order={estimator.order!r} and curvature={estimator.curvature!r}."
            )
        self.fitted: FittedStage = estimator.fit(alone(session), estimator.cuts(), alone=False)
        self.session = self.fitted.stage.session
        self.terms = [Term(tuple(own.steps.checkpoints), own.used) for own in self.fitted.segments]
        self.query_bytes = self.fitted.query_bytes()

    def responses(self, first: int, last: int) -> Iterator[tuple[int, Responses]]:
        """See :class:`Responder`."""
        stage, segments = self.fitted.stage, self.fitted.segments
        handed = final_adjoint(stage, first, last)
        adjoint, _ = entered(stage, segments[-1], handed, last - first)
        for segment in reversed(segments):
            inside = {name: segment.enter(name, own) for name, own in adjoint.items()}
            found = averaged.segment_responses(segment, inside)
            yield (
                segment.number,
                _by_block(self.session, {name: own.lifted() for name, own in found.items()}),
            )
            adjoint = segment.crossing(adjoint, inside).adjoint


def _by_block(session: Session, units: Responses) -> Responses:
    """Responses by unit of curvature as responses by block."""
    if WHOLE in units:
        return as_matrices(session.blocks, units[WHOLE][:, 0, 0])
    return units
