"""The states of the steps of a stretch, kept for the reverse sweep: in memory or in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tda_lightning.replay.run import Draws

Keep = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepState:
    """What the way back needs of one step.

    Attributes:
        row: of the steps table.
        parameters: before the step.
        counts: what layers with running statistics had counted before each of its batches.
        loss: mean over its batches.
        draws: of the random generators, batch by batch.
        gradient: before clipping, of the parameters that had one; empty where it is not needed.
        without: parameters that had none; the optimizer passes over them.
        states: by parameter, what the optimizer's adjoint reads of its states after the step.
        count: how often the optimizer has stepped each parameter, if it counts.
        new_states: by parameter, names of the states that began with this step.
    """

    row: int
    parameters: Mapping[str, Tensor]
    counts: tuple[Mapping[str, Tensor], ...]
    loss: float
    draws: tuple[Draws | None, ...]
    gradient: Mapping[str, Tensor]
    without: frozenset[str]
    states: Mapping[str, Mapping[str, Tensor]]
    count: Mapping[str, float]
    new_states: Mapping[str, frozenset[str]]


def keep_in_memory(tensor: Tensor) -> Tensor:
    """A copy in main memory, wherever the tensor is."""
    return tensor.detach().to("cpu", copy=True)


class DiskRoom:
    """Copies of tensors in a temporary file that is mapped into memory, and gone at the end.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="tda-unrolled-")
        file = str(Path(self._folder.name) / "states")
        self._bytes = torch.from_file(file, shared=True, size=max(size, 8), dtype=torch.uint8)
        self._used = 0

    def clear(self) -> None:
        """Forget the copies: their room is used again."""
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy in the file."""
        start = self._used
        self._used += room_of(tensor)
        place = self._bytes[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor.detach())

    def close(self) -> None:
        """Remove the file."""
        self._folder.cleanup()


def room_of(tensor: Tensor) -> int:
    """Bytes that a copy takes, so that the next one is aligned."""
    return -(-tensor.nbytes // 16) * 16
