"""What every estimator is to the rest of the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from tda_lightning.records.provenance import Provenance
from tda_lightning.records.score_sinks import ScoreSink
from tda_lightning.session.session import Session
from tda_lightning.session.stage import Stage


class Estimator(Protocol):
    """Settings, and a method that computes scores. A new estimator is a dataclass that has both.

    One whose self-influence takes much longer than its scores says so by a class variable
    ``costly_self_influence = True``: it is then computed only where it is asked for.
    """

    def segment_count(self, session: Session) -> int | None:
        """Into how many stretches of training the scores are split; None if they are not."""

    def score(self, session: Session) -> Provenance:
        """Add the scores to ``session.scores``; returns how they were made."""


def self_influence_by_default(estimator: Estimator) -> bool:
    """Whether self-influence costs little beside the scores."""
    return not getattr(estimator, "costly_self_influence", False)


@runtime_checkable
class StagedEstimator(Estimator, Protocol):
    """An estimator that also follows a query back through several stages of training."""

    def stage_segment_counts(self, stages: Sequence[Stage]) -> list[int]:
        """Into how many stretches the scores of each stage are split."""

    def score_stages(self, stages: Sequence[Stage]) -> Provenance:
        """Add the scores of every stage to its ``session.scores``."""


@runtime_checkable
class EnsembleEstimator(Estimator, Protocol):
    """An estimator whose scores of an ensemble are not the mean of its members' scores."""

    def score_ensemble(self, sessions: Sequence[Session], combined: ScoreSink) -> list[Provenance]:
        """Add each member's scores to its ``session.scores``, and those of the ensemble to
        ``combined``; returns how each member's were made. Self-influence that is added to the
        sessions is averaged."""
