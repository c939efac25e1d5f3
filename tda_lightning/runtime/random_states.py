"""States of the process's random generators: read, compared, kept, restored.

The generators are torch's (``torch`` and, where CUDA is in use, ``cuda<i>``) and the global ones of
Python and NumPy, which data sets and transforms draw from. As tensors their states are

- ``torch``, ``cuda<i>``: uint8, torch's own form;
- ``python``, ``numpy``: int64 [627], the 624 words and the position of the Mersenne twister,
  whether a second normal number waits to be handed out, and the bits of that float64.

NumPy's global generator can be replaced by one that is no Mersenne twister. Its state is then not
among them: what the process draws from it cannot be repeated from here.
"""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tda_lightning.runtime.random_state_forms import TWISTERS, WORDS, require_forms

States = dict[str, Tensor]

_PYTHON = 3  # the version of Python's form of a state since Python 3.2


@dataclass(frozen=True)
class Snapshot:
    """The states in forms that are quick to take and to compare: "==" tells whether nothing was
    drawn in between."""

    devices: tuple[tuple[str, bytes], ...]  # of torch
    python: tuple[Any, ...]  # of random.getstate()
    numpy: tuple[bytes, int, float | None] | None  # words, position, the number that waits

    @staticmethod
    def take() -> Snapshot:
        """The states as they are. Nothing is drawn, and CUDA is not started."""
        states = [("torch", torch.get_rng_state())]
        # Asking for a state would start CUDA in a process that does not use it.
        if torch.cuda.is_initialized():
            states += [(f"cuda{i}", s) for i, s in enumerate(torch.cuda.get_rng_state_all())]
        devices = tuple((name, state.numpy().tobytes()) for name, state in states)
        return Snapshot(devices, random.getstate(), _numpy_twister())

    def like(self, other: Snapshot) -> Snapshot:
        """The same; what equals the parts of ``other`` is held once."""
        python = other.python if self.python == other.python else self.python
        numpy = other.numpy if self.numpy == other.numpy else self.numpy
        return Snapshot(self.devices, python, numpy)

    def states(self) -> States:
        """The states as tensors."""
        states = {n: torch.frombuffer(bytearray(s), dtype=torch.uint8) for n, s in self.devices}
        _, counts, waiting = self.python
        states["python"] = _vector(np.array(counts[:-1], np.uint32), counts[-1], waiting)
        if self.numpy is not None:
            words, position, waiting = self.numpy
            states["numpy"] = _vector(np.frombuffer(words, np.uint32), position, waiting)
        return states

    @staticmethod
    def of(states: Mapping[str, Tensor]) -> Snapshot:
        """The reverse of :meth:`states`."""
        devices = [name for name in states if name not in TWISTERS]
        words, position, waiting = _unpacked(states["python"])
        python = (_PYTHON, (*words.tolist(), position), waiting)
        numpy = None
        if "numpy" in states:
            words, position, waiting = _unpacked(states["numpy"])
            numpy = (words.tobytes(), position, waiting)
        # In the order in which they are taken: files list them by the alphabet.
        devices.sort(key=lambda name: int(name.removeprefix("cuda")) if name != "torch" else -1)
        return Snapshot(
            tuple((name, states[name].numpy().tobytes()) for name in devices), python, numpy
        )

    def restore(self) -> None:
        """Put the generators into these states; devices that are not here are passed over."""
        for name, content in self.devices:
            state = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if name == "torch":
                torch.set_rng_state(state)
            elif (device := int(name.removeprefix("cuda"))) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            words, position, waiting = self.numpy
            rest = (position, int(waiting is not None), 0.0 if waiting is None else waiting)
            twister = ("MT19937", np.frombuffer(words, np.uint32), *rest)
            np.random.set_state(twister)  # noqa: NPY002


def _vector(words: np.ndarray, position: int, waiting: float | None) -> Tensor:
    """The state of a twister, int64 [627]."""
    (bits,) = struct.unpack("<q", struct.pack("<d", 0.0 if waiting is None else waiting))
    rest = np.array([position, waiting is not None, bits], np.int64)
    return torch.from_numpy(np.concatenate([words.astype(np.int64), rest]))


def _unpacked(state: Tensor) -> tuple[np.ndarray, int, float | None]:
    """The reverse of :func:`_vector`."""
    position, waits, bits = state[WORDS:].tolist()
    (number,) = struct.unpack("<d", struct.pack("<q", bits))
    return state[:WORDS].numpy().astype(np.uint32), position, number if waits else None


_last_numpy: tuple[bytes, tuple[bytes, int, float | None]] | None = None  # memory, and its state


def _numpy_twister() -> tuple[bytes, int, float | None] | None:
    """The state of NumPy's global generator; None for one of another kind.

    Where NumPy's own way to tell it takes longer than all the others together, a look at the memory
    of its words shows that nothing was drawn. Of two normal numbers that are drawn together the
    second is handed out without a trace there, so one that waits must be asked for.
    """
    global _last_numpy
    generator = np.random.mtrand.get_bit_generator()
    if not isinstance(generator, np.random.MT19937):
        return None
    address = generator.ctypes.state_address
    memory = ctypes.string_at(address, 4 * WORDS + 4)  # the words and the position
    if _last_numpy is not None and _last_numpy[0] == memory and _last_numpy[1][2] is None:
        return _last_numpy[1]
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    waiting = float(state["gauss"]) if state["has_gauss"] else None
    found = (state["state"]["key"].tobytes(), int(state["state"]["pos"]), waiting)
    _last_numpy = memory, found
    return found


def current_states() -> States:
    """The states of all generators. Nothing is drawn, and CUDA is not started."""
    return Snapshot.take().states()


def restore_states(states: Mapping[str, Tensor]) -> None:
    """Put the generators into ``states``; those of CUDA devices that are not here are passed over.

    ``states`` are those of :func:`current_states`, or have passed ``require_forms``.
    """
    Snapshot.of(states).restore()


def require_restorable(states: Mapping[str, Tensor]) -> None:
    """Check states that come from a file: a wrong one could make a generator read beyond its words.

    Raises:
        ValueError, RuntimeError: they are not such as :func:`current_states` gives.
    """
    require_forms(states)
    torch.Generator().set_state(states["torch"].clone())  # torch 2.13 crashes at a row of a table


@contextmanager
def unchanged_randomness(owner: object = None) -> Iterator[None]:
    """Leave every random generator as it was: the global ones, and those ``owner`` holds."""
    snapshot = Snapshot.take()
    # Whatever its kind.
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    with ExitStack() as undo:
        for generator in _generators_of(owner):
            undo.callback(_restore, generator, _state(generator))
        try:
            yield
        finally:
            snapshot.restore()
            np.random.set_state(numpy)  # noqa: NPY002


def _state(generator: _Generator) -> object:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state


def _restore(generator: _Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


_Generator: TypeAlias = (
    torch.Generator | random.Random | np.random.RandomState | np.random.Generator
)
_FEW = 256  # longer containers hold data, not the parts that an object is made of


def _generators_of(owner: object) -> list[_Generator]:
    """The random generators reachable from ``owner`` through attributes and short containers."""
    found, seen, waiting = [], set(), [owner]
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, (Tensor, np.ndarray, str, bytes, type)):
            continue
        seen.add(id(part))
        if isinstance(part, _Generator):
            found.append(part)
        elif isinstance(part, Mapping):
            waiting.extend(part.values() if len(part) <= _FEW else ())
        elif isinstance(part, (Sequence, set, frozenset)):
            waiting.extend(part if isinstance(part, (list, tuple)) and len(part) <= _FEW else ())
        waiting.extend(getattr(part, "__dict__", {}).values())
    return found
