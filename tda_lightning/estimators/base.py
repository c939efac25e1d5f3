"""What every estimator is to the rest of the library."""

from __future__ import annotations

from typing import Protocol

from tda_lightning.passes import Context, Plan


class Estimator(Protocol):
    """Settings with two verbs. A new estimator is a dataclass that has them."""

    def segment_count(self, context: Context) -> int | None:
        """Into how many stretches of training the scores are split; None if they are not."""

    def plan(self, context: Context) -> Plan:
        """The passes over the training set that compute the scores into ``context.sink``."""
