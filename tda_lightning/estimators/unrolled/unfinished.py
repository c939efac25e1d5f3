"""How far an attribution has come, kept after every interval; interrupted, it goes on there."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tda_lightning.optimizers import rule_of
from tda_lightning.runtime.digests import digest

if TYPE_CHECKING:
    from tda_lightning.estimators.unrolled.run import UnrolledRun

_SECONDS = 30.0  # of work that may be lost; more where keeping it takes longer than a second


@dataclass
class Unfinished:
    """The state of one round of queries at the start of an interval; of a round that is done, its
    scores, until all rounds are.

    Attributes:
        key: of everything that determines the scores.
        found: what an interrupted attribution left; None for a fresh start.
    """

    key: str
    found: dict[str, Tensor] | None
    _kept_at: float = 0.0
    _took: float = 0.0

    @staticmethod
    def of(run: UnrolledRun, first: int, last: int) -> Unfinished:
        """That of the queries ``first`` to ``last``."""
        if run.context.num_processes > 1:
            return Unfinished("", None)
        key = _key(run, first, last)
        kept = run.trajectory.unfinished.get(key)
        found = None if kept is None else {name: tensor.clone() for name, tensor in kept.items()}
        return Unfinished(key, found, time.monotonic())

    @property
    def row(self) -> int | None:
        """Where the walk back goes on; None for the end of training."""
        return None if self.found is None else int(self.found["row"])

    def keep(self, run: UnrolledRun, row: int) -> None:
        """Keep the state at ``row``, where much work would be lost without."""
        began = time.monotonic()
        recent = began - self._kept_at < _SECONDS * max(1.0, self._took)
        if run.context.num_processes > 1 or (recent and row > run.first_row):
            return
        # Copies: a run in memory keeps the tensors themselves, and the walk goes on in them.
        found = {name: tensor.clone() for name, tensor in run.tensors().items()}
        run.trajectory.unfinished[self.key] = {"row": torch.tensor(row), **found}
        self._kept_at = time.monotonic()
        self._took = self._kept_at - began

    def discard(self, run: UnrolledRun) -> None:
        """Keep it no longer."""
        if self.key in run.trajectory.unfinished:
            del run.trajectory.unfinished[self.key]


def _key(run: UnrolledRun, first: int, last: int) -> str:
    context, facts, steps = run.context, run.trajectory.facts, run.trajectory.steps
    options = asdict(run.options)
    # Neither how much memory there is nor where states are kept changes a score.
    for name in ("memory_budget", "states"):
        del options[name]
    description = {
        "alike": context.cache_key([run.checkpoints[-1]]),
        "options": json.dumps(options, sort_keys=True, default=repr),
        "run": facts.settings.get("run_id"),
        "checkpoints": run.checkpoints,
        "states": rule_of(run.trajectory).states,
        "steps": [steps.examples, steps.learning_rate],
        "queries": [first, last, *map(digest, context.queries(first, last))],
    }
    return digest(description)
