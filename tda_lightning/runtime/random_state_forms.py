"""What stored states of random generators look like, checked with NumPy alone.

:mod:`tda_lightning.runtime.random_states` says what the states are.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

TWISTERS = ("python", "numpy")  # generators whose states are int64
WORDS = 624  # of a Mersenne twister
_TWISTER = WORDS + 3
_CUDA = re.compile(r"cuda(0|[1-9]\d{0,3})", re.ASCII)
_CUDA_STATE = struct.Struct("<Qq")  # seed, offset
# Of torch: seed, left, seeded, next, the words, three numbers of the double normal and its flag,
# the single normal and its flag.
_TORCH_STATE = struct.Struct("<QiiQ4992x3di4xfB3x")


def require_forms(states: Mapping[str, Any]) -> None:
    """Check states that come from a file: a wrong one could make a generator read beyond its words.

    Args:
        states: by generator, as tensors or arrays.

    Raises:
        ValueError: they are not such as ``random_states.current_states`` gives.
    """
    if not {"torch", "python"} <= states.keys():
        raise ValueError(f"random states of {sorted(states)}, expected torch's and Python's")
    for name, state in states.items():
        if name in TWISTERS:
            _require_twister(name, _formed(name, state, "int64", _TWISTER))
        elif name == "torch":
            _require_torch(_formed(name, state, "uint8", _TORCH_STATE.size))
        elif _CUDA.fullmatch(name):
            _require_cuda(name, _formed(name, state, "uint8", _CUDA_STATE.size))
        else:
            raise ValueError(f"a random state of an unknown generator {name[:100]!r}")


def _formed(name: str, state: Any, dtype: str, length: int) -> np.ndarray:
    """The state as an array of the expected type and length."""
    array = np.asarray(state)
    if array.dtype != np.dtype(dtype) or array.shape != (length,):
        raise ValueError(
            f"the random state of {name} is {array.dtype} {list(array.shape)}, expected {dtype} "
            f"[{length}]"
        )
    return array


def _require_twister(name: str, state: np.ndarray) -> None:
    words, (position, waits, bits) = state[:WORDS], state[WORDS:].tolist()
    inside = bool(((words >= 0) & (words < 1 << 32)).all()) and 0 <= position <= WORDS
    # A twister that is all zero stays so, and to draw a normal number with it never ends.
    alive = bool(words[1:].any()) or int(words[0]) >> 31
    (number,) = struct.unpack("<d", struct.pack("<q", bits))
    if not inside or not alive or waits not in (0, 1) or not math.isfinite(number):
        raise ValueError(f"the random state of {name} is none of a Mersenne twister")


def _require_torch(state: np.ndarray) -> None:
    _, left, seeded, following, *numbers = _TORCH_STATE.unpack(state.tobytes())
    x, y, rho, waits, single, single_waits = numbers
    # torch itself does not check that the two counts lead to no word beyond the last.
    inside = 1 <= left <= WORDS and following <= WORDS and left + following <= WORDS + 1
    flags = seeded == 1 and waits in (0, 1) and single_waits in (0, 1)
    if not inside or not flags or not all(math.isfinite(n) for n in (x, y, rho, single)):
        raise ValueError("the random state of torch is none of a Mersenne twister")


def _require_cuda(name: str, state: np.ndarray) -> None:
    _, offset = _CUDA_STATE.unpack(state.tobytes())
    if offset < 0 or offset % 4:
        raise ValueError(f"the random state of {name} has offset {offset}")
