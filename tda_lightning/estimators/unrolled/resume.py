"""How far an attribution has come, kept next to the trajectory, to resume after interruptions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping

import torch
from torch import Tensor

_SECONDS = 30.0  # of work that may be lost; more where keeping it takes longer than a second


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
