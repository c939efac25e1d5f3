"""The process's random generators, seeded for a while and then as they were.

For draws that nobody sees: code that calls NumPy, Python's ``random`` or a compiled function draws
the same numbers each time. To seed NumPy takes longer than a small model's forward pass, so it is
seeded from the first time on that something was drawn from it here.
"""

from __future__ import annotations

import ctypes
import random
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_drawn_from: set[str] = set()  # of "NumPy", "Python", since the process began


class SeededGenerators:
    """torch's CPU generator, and those of NumPy and Python if something drew from them before.

    :meth:`seed` may be called again to begin anew; :meth:`restore` ends it.
    """

    def __init__(self) -> None:
        self._before = (torch.get_rng_state(), random.getstate())
        self._numpy = np.random.get_state(legacy=False) if "NumPy" in _drawn_from else None  # noqa: NPY002
        self._begun = self._now()

    def seed(self, seed: int) -> None:
        """Put the generators into states that belong to ``seed``."""
        torch.set_rng_state(_torch_state(seed))
        if "Python" in _drawn_from:
            random.setstate(_python_state(seed))
        if self._numpy is not None:
            np.random.set_state(_numpy_state(seed))  # noqa: NPY002
        self._begun = self._now()

    def drawn_from(self) -> set[str]:
        """Which of torch, Python and NumPy something was drawn from since they were seeded."""
        found = {
            name
            for (name, before), after in zip(self._begun.items(), self._now().values(), strict=True)
            if not (torch.equal(before, after) if name == "torch" else before == after)
        }
        _drawn_from.update(found - {"torch"})
        return found

    def restore(self) -> None:
        """Put the generators back as they were."""
        torch.set_rng_state(self._before[0])
        random.setstate(self._before[1])
        if self._numpy is not None:
            np.random.set_state(self._numpy)  # noqa: NPY002

    def _now(self) -> dict[str, Any]:
        return {
            "torch": torch.get_rng_state(),
            "Python": random.getstate(),
            "NumPy": _numpy_words(),
        }


def _numpy_words() -> bytes | None:
    """The memory of NumPy's global generator; None of one that is no Mersenne twister."""
    generator = np.random.mtrand.get_bit_generator()
    if not isinstance(generator, np.random.MT19937):
        return None
    return ctypes.string_at(generator.ctypes.state_address, 4 * 624 + 4)


@lru_cache(16)
def _torch_state(seed: int) -> Tensor:
    return torch.Generator().manual_seed(seed & (1 << 63) - 1).get_state()


@lru_cache(16)
def _python_state(seed: int) -> tuple[Any, ...]:
    return random.Random(seed).getstate()


@lru_cache(16)
def _numpy_state(seed: int) -> dict[str, Any]:
    return np.random.RandomState(seed & (1 << 32) - 1).get_state(legacy=False)
