"""How far an attribution has come, kept next to the trajectory, to resume after interruptions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from tda_lightning.edits import EditSet, GraphEditSet
from tda_lightning.optimizers import rule_of
from tda_lightning.runtime.digests import digest
from tda_lightning.session.stage import Stage

_SECONDS = 30.0  # of work that may be lost; more where keeping it takes longer than a second
_FORMAT = 3  # of what is kept


class UnfinishedRound:
    """The state of one round of queries at the start of a stretch of steps; of a round that is
    done, its scores, until all rounds are.

    Args:
        store: what the trajectory keeps of unfinished attributions, by key.
        key: digest of everything that determines the scores; None: nothing is kept.

    Attributes:
        tensors: what an interrupted attribution left; None for a fresh start.
    """

    def __init__(self, store: MutableMapping[str, Mapping[str, Tensor]], key: str | None) -> None:
        self._store, self._key = store, key
        stored = None if key is None else store.get(key)
        self.tensors = None if stored is None else {n: t.clone() for n, t in stored.items()}
        self._kept_at, self._duration = time.monotonic(), 0.0

    @property
    def row(self) -> int | None:
        """Where the reverse sweeps resume; None for the end of training."""
        return None if self.tensors is None else int(self.tensors["row"])

    def keep(self, row: int, state: Callable[[], Mapping[str, Tensor]], last: bool) -> None:
        """Keep the ``state`` at ``row`` where much work would be lost without it, and at the
        ``last`` row."""
        began = time.monotonic()
        recent = began - self._kept_at < _SECONDS * max(1.0, self._duration)
        if self._key is None or (recent and not last):
            return
        # Copies: a run in memory keeps the tensors themselves, which the sweeps go on changing.
        tensors = {name: tensor.clone() for name, tensor in state().items()}
        self._store[self._key] = {"row": torch.tensor(row), **tensors}
        self._kept_at = time.monotonic()
        self._duration = self._kept_at - began

    def discard(self) -> None:
        """Keep it no longer."""
        if self._key is not None and self._key in self._store:
            del self._store[self._key]


def round_key(
    settings: Mapping[str, object], stages: Sequence[Stage], first: int, last: int
) -> str:
    """Digest of everything that determines the scores of the queries ``first`` to ``last``.

    Args:
        settings: of the estimator, those that a score depends on.
    """
    session = stages[-1].session
    edits = session.edits
    return digest(
        {
            **({"by_token": True} if session.by_token else {}),
            **({} if session.rows is None else {"rows": session.rows.position}),
            "format": _FORMAT,
            "settings": json.dumps(settings, sort_keys=True, default=repr),
            "stages": [_content(stage) for stage in stages],
            "edits": None if edits is None else _terms_digest(edits),
            **({} if session.asked is None else {"measurement": session.asked.settings()}),
            "queries": [first, last, *map(digest, session.queries(first, last))],
        }
    )


def _content(stage: Stage) -> list[object]:
    """What the scores of a stage are determined by."""
    session, trajectory = stage.session, stage.session.trajectory
    return [
        session.cache_key([trajectory.last_step]),
        trajectory.facts.settings.get("run_id"),
        sorted(trajectory.checkpoints),
        rule_of(trajectory).states,
        [trajectory.steps.examples, trajectory.steps.learning_rate],
        [stage.frozen, stage.carried],
    ]


def _terms_digest(edits: EditSet | GraphEditSet) -> str:
    """Digest of what the edits put in place of what."""
    if isinstance(edits, GraphEditSet):
        return digest(edits.records())
    return digest(
        [
            [column, term.sign, term.index, term.example, list(term.labels)]
            for column, term in edits.terms
        ]
    )
