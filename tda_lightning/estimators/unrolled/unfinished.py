"""How far an attribution has come, kept after every interval; interrupted, it goes on there."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tda_lightning.session.passes import Session

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
    context = run.context
    digest = hashlib.sha256()
    digest.update(context.cache_key([run.checkpoints[-1]]).encode())
    facts = run.trajectory.facts
    about = {
        # Neither how much memory there is nor where states are kept changes a score.
        "options": {
            key: value
            for key, value in asdict(run.options).items()
            if key not in ("memory_budget", "states")
        },
        "run": facts.settings.get("run_id"),
        "checkpoints": run.checkpoints,
        "queries": [first, last],
    }
    digest.update(json.dumps(about, sort_keys=True, default=repr).encode())
    for tensor in (run.trajectory.steps.examples, run.trajectory.steps.learning_rate):
        _update(digest, tensor)
    _update_with_queries(digest, context, first, last)
    return digest.hexdigest()


def _update_with_queries(digest: hashlib._Hash, context: Session, first: int, last: int) -> None:
    for batch, indices in context.queries(first, last):
        for leaf in pytree.tree_leaves([batch, indices]):
            if isinstance(leaf, Tensor):
                _update(digest, leaf)
            else:
                digest.update(repr(leaf).encode())


def _update(digest: hashlib._Hash, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(plain.numpy().tobytes())
