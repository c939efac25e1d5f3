"""States of the process's random generators: read, kept, restored."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def tensor_states() -> dict[str, Tensor]:
    """States of torch's generators: ``torch`` and, where CUDA is in use, ``cuda<i>``."""
    states = {"torch": torch.get_rng_state()}
    # Asking for a state would start CUDA in a process that does not use it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda{device}"] = state
    return states


def json_states() -> dict[str, Any]:
    """States of Python's and NumPy's global generators, as plain numbers."""
    name, keys, *rest = _numpy_state()
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def _numpy_state() -> Any:
    # The old global generator is the one that data sets and transforms still draw from.
    return np.random.get_state()  # noqa: NPY002


@contextmanager
def unchanged_randomness(owner: Any = None) -> Iterator[None]:
    """Leave every random generator as it was: the global ones, and those ``owner`` holds."""
    tensors = tensor_states()
    python, numpy = random.getstate(), _numpy_state()
    with ExitStack() as undo:
        for generator in _generators_of(owner):
            undo.callback(_restore, generator, _state(generator))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            torch.set_rng_state(tensors.pop("torch"))
            for name, state in tensors.items():
                torch.cuda.set_rng_state(state, int(name.removeprefix("cuda")))


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
_FEW = 256  # longer containers hold data, not the parts that an object is made of


def _generators_of(owner: Any) -> list[Any]:
    """The random generators reachable from ``owner`` through attributes and short containers."""
    found, seen, waiting = [], set(), [owner]
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, (Tensor, np.ndarray, str, bytes, type)):
            continue
        seen.add(id(part))
        if isinstance(part, _GENERATORS):
            found.append(part)
        elif isinstance(part, Mapping):
            waiting.extend(part.values() if len(part) <= _FEW else ())
        elif isinstance(part, (Sequence, set, frozenset)):
            waiting.extend(part if isinstance(part, (list, tuple)) and len(part) <= _FEW else ())
        waiting.extend(getattr(part, "__dict__", {}).values())
    return found
