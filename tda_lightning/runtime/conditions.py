"""Conditions on tensors, which are read where reading is free.

Reading a tensor of a GPU makes the host wait for all work that it has given out. In a walk over a
data set a condition on such a tensor is only noted, and all of them are read at once at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

_MOST = 1000  # noted at once: each keeps the tensors that its message tells of
_noted: list[tuple[Tensor, Callable[[], NoReturn]]] = []
_open: list[None] = []  # one for each walk that is under way


def waits(tensor: Tensor) -> bool:
    """Whether reading a tensor makes the host wait."""
    return tensor.device.type != "cpu"


def require(holds: Tensor, error: Callable[[], NoReturn]) -> None:
    """Call ``error`` where ``holds``, a tensor of one truth value, does not: now, or at the end
    of the walk.

    Args:
        error: raises; it may read tensors.
    """
    if not _open or not waits(holds):
        if not bool(holds):
            error()
        return
    _noted.append((holds, error))
    if len(_noted) >= _MOST:
        settle()


@contextmanager
def noted() -> Iterator[None]:
    """Conditions within are read at the end, or when :func:`settle` is called."""
    _open.append(None)
    try:
        yield
    except BaseException:  # the walk is not gone through to its end
        _noted.clear()
        raise
    finally:
        _open.pop()
    settle()


def settle() -> None:
    """Read what has been noted, and raise the first error."""
    found = list(_noted)
    _noted.clear()
    by_device: dict[torch.device, list[Tensor]] = {}
    for holds, _ in found:
        by_device.setdefault(holds.device, []).append(holds)
    if all(bool(torch.stack(own).all()) for own in by_device.values()):
        return
    for holds, error in found:
        if not bool(holds):
            error()
