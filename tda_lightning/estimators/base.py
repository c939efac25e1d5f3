"""What every estimator is to the rest of the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from tda_lightning.session.passes import Context, Plan, Stage


class Estimator(Protocol):
    """Settings with two verbs. A new estimator is a dataclass that has them."""

    def segment_count(self, context: Context) -> int | None:
        """Into how many stretches of training the scores are split; None if they are not."""

    def plan(self, context: Context) -> Plan:
        """The passes over the training set that compute the scores into ``context.sink``."""


@runtime_checkable
class StagedEstimator(Estimator, Protocol):
    """An estimator that also follows a query back through several stages of training."""

    def stage_segment_counts(self, stages: Sequence[Stage]) -> list[int]:
        """Into how many stretches the scores of each stage are split."""

    def plan_stages(self, stages: Sequence[Stage]) -> Plan:
        """The passes over all stages' training sets, into each stage's ``context.sink``."""
