"""The process's random generators, seeded for a while and then as they were.

For draws that nobody sees: code that calls Python's ``random`` or a compiled function draws the
same numbers each time. To seed NumPy takes longer than a small model's forward pass, and to read
Python's state not much less, so both are left alone until something was seen to draw from them.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import numpy as np
import torch

_drawn_from: set[str] = set()  # of "NumPy", "Python", since the process began


def drawn_from_numpy() -> bool:
    """Whether something was seen to draw from NumPy."""
    return "NumPy" in _drawn_from


class SeededGenerators:
    """torch's CPU generator, and those of NumPy and Python if something drew from them before.

    :meth:`seed` may be called again to begin anew; :meth:`restore` ends it.

    Args:
        watched: whether :meth:`drawn_from` will be asked.
    """

    def __init__(self, watched: bool) -> None:
        self._seeds = {"torch", *_drawn_from}
        if np.random.mtrand.get_bit_generator().__class__ is not np.random.MT19937:
            self._seeds.discard("NumPy")  # it was replaced by one of another kind
        self._watched = {"torch", "Python", "NumPy"} if watched else self._seeds
        self._before = {name: _READ[name]() for name in self._watched}
        self._begun: dict[str, Any] = {}

    def seed(self, seed: int) -> None:
        """Put the generators into states that belong to ``seed``."""
        for name in self._seeds:
            _WRITE[name](_state(name, seed))
        self._begun = {
            name: _state(name, seed) if name in self._seeds else before
            for name, before in self._before.items()
        }

    def drawn_from(self) -> set[str]:
        """Which of torch, Python and NumPy something was drawn from since they were seeded."""
        found = {
            name for name in self._watched if not _same(name, _READ[name](), self._begun[name])
        }
        _drawn_from.update(found - {"torch"})
        return found

    def restore(self) -> None:
        """Put the generators back as they were."""
        for name, state in self._before.items():
            _WRITE[name](state)


def _read_numpy() -> dict[str, Any]:
    return np.random.get_state(legacy=False)  # type: ignore[return-value]  # noqa: NPY002


_READ: dict[str, Any] = {
    "torch": torch.get_rng_state, "Python": random.getstate, "NumPy": _read_numpy,
}  # fmt: skip
_WRITE: dict[str, Any] = {
    "torch": torch.set_rng_state, "Python": random.setstate, "NumPy": np.random.set_state,
}  # fmt: skip


def _same(name: str, one: Any, other: Any) -> bool:
    if name == "torch":
        return torch.equal(one, other)
    if name == "Python":
        return bool(one == other)
    if one["bit_generator"] != other["bit_generator"] or one["has_gauss"] != other["has_gauss"]:
        return False
    # Of a Mersenne twister; another's state is a few numbers.
    words, others = one["state"], other["state"]
    return words.keys() == others.keys() and all(
        np.array_equal(value, others[key]) for key, value in words.items()
    )


@lru_cache(32)
def _state(name: str, seed: int) -> Any:
    """The state that belongs to a seed."""
    if name == "torch":
        return torch.Generator().manual_seed(seed & (1 << 63) - 1).get_state()
    if name == "Python":
        return random.Random(seed).getstate()
    return np.random.RandomState(seed & (1 << 32) - 1).get_state(legacy=False)
