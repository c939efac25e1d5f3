"""A stage of training with its fitted curvature, and what a reader should know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tda_lightning.curvature import DeflatedSpectrum
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.source import averaged, blockwise, recorded, stepwise
from tda_lightning.estimators.source.felt import felt_note
from tda_lightning.estimators.source.looked_up import query_bytes, rows_of_queries
from tda_lightning.estimators.source.matrix_free import MatrixFreeOrder
from tda_lightning.estimators.source.segments import Cross, FittedSegment
from tda_lightning.estimators.use_notes import use_notes
from tda_lightning.optimizers import applied_rates
from tda_lightning.records.trajectory import Segment
from tda_lightning.session.session import Session
from tda_lightning.session.stage import Stage

_HELD = 0.7  # of the curvature in their own sample, below which a note says so
_NO_SELF_STEPWISE = (
    "No self-influence: in the recorded order of an optimizer whose steps are not linear in the "
    "gradients, every example needs an adjoint of its own. Ask for examples as queries, or use "
    "order='average'."
)
_NO_SELF_MATRIX_FREE = (
    "No self-influence: every training example would need products of its own. Ask for examples as "
    "queries, or use another curvature."
)


@dataclass(frozen=True)
class FittedStage:
    """A stage of training, ready to be crossed.

    Attributes:
        segments: with their curvature.
        cross: scores a segment and carries the queries' adjoint to its start.
        copies: dense gradients that each query takes meanwhile.
        leading: number of leading directions.
        products: of matrix-free curvature, with their record.
        looked_up: units of which only the rows that queries touch are followed.
    """

    stage: Stage
    segments: list[FittedSegment]
    cross: Cross
    copies: int
    leading: int
    products: MatrixFreeOrder | None
    looked_up: Sequence[str] = ()

    def near(self, first: int, last: int) -> FittedStage:
        """The stage for the queries ``first`` to ``last``: restricted to the rows that they touch
        (``looked_up.py``)."""
        if not self.looked_up:
            return self
        session = self.stage.session
        themselves = self._as_queries and first == 0
        rows = rows_of_queries(session, self.looked_up, first, last, themselves)
        segments = [segment.restricted(rows) for segment in self.segments]
        session = segments[-1].session
        return replace(
            self, stage=replace(self.stage, session=session, wide=session), segments=segments
        )

    @property
    def stays_in_bases(self) -> bool:
        """Whether queries may be followed in the bases of the segments (``blockwise.py``)."""
        return self.cross is averaged.cross and blockwise.stays_in_bases(self.segments)

    def query_bytes(self) -> int:
        """Bytes that a query takes on its way back."""
        session = self.stage.wide
        if not self.looked_up or self._as_queries:
            return session.gradient_bytes(self.copies)
        return query_bytes(session, self.looked_up, self.copies)

    @property
    def _as_queries(self) -> bool:
        """Whether training examples are scored for themselves along with the first queries."""
        return self.stage.session.self_influence and self.cross is recorded.cross

    def notes(self) -> list[str]:
        """What a reader should know of how this run was followed."""
        session, segments = self.stage.session, [segment.steps for segment in self.segments]
        notes = clipping_notes(session.trajectory)
        if self.cross is not stepwise.cross:  # which takes every group's own rate at every step
            notes += _notes_on_rates(session, segments)
        else:
            notes += stepwise.notes_on_bounds(self.segments)
        notes += _note_on_leading(self.segments)
        notes += felt_note(metric.felt for metric in self.segments[0].metrics.values())
        if self.cross not in (recorded.cross, stepwise.cross):  # which follow the batches
            notes += use_notes(session)
        if session.self_influence and self.cross is stepwise.cross:
            notes.append(_NO_SELF_STEPWISE)
        if session.self_influence and self.products is not None:
            notes.append(_NO_SELF_MATRIX_FREE)
        return notes if self.products is None else notes + self.products.notes()


def _note_on_leading(segments: Sequence[FittedSegment]) -> list[str]:
    """That leading directions fit their sample of examples much better than others, where so."""
    spectra = [segment.curvature.get(WHOLE) for segment in segments]
    held = [one.leading.held for one in spectra if isinstance(one, DeflatedSpectrum)]
    if not held or min(held) > _HELD:
        return []
    return [
        f"The leading directions hold {min(held):.0%} of the curvature in other examples that they "
        "hold in those they were fitted to: what is more is left to the blocks. Fewer "
        "leading_directions are fitted better."
    ]


def _notes_on_rates(session: Session, segments: Sequence[Segment]) -> list[str]:
    """Name the segments over which a changing ratio of rates is averaged (``segments.py``)."""
    facts = session.trajectory.facts.parameters
    groups = sorted({facts[name].group for name in session.engine.names})
    averaged_in = []
    for number, segment in enumerate(segments, start=1):
        rates = applied_rates(session.trajectory, segment.rows)[:, groups]
        times = rates.sum(0)
        # Rates in a fixed ratio are, step by step, the same part of each group's sum.
        differences = (rates * times.max() - rates[:, [int(times.argmax())]] * times).abs()
        if bool((differences > 1e-6 * (rates.max() * times.max())).any()):
            averaged_in.append(str(number))
    if not averaged_in:
        return []
    return [
        "The learning rates of the parameter groups change their ratio within segment "
        f"{', '.join(averaged_in)}: the ratio of their sums over the segment is used throughout. "
        "More segments, or cuts (segment_steps) where a schedule changes, follow it closer."
    ]
