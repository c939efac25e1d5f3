"""A further backward pass that leaves training where it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put the buffers of ``module`` and the random generators back afterwards.

    A backward pass changes neither by itself, but gradient checkpointing runs a part of the
    forward pass again in it: batch norm then counts its batch once more, and dropout draws.
    """
    buffers = [buffer for buffer in module.buffers() if not buffer.is_sparse]
    kept = [buffer.detach().clone() for buffer in buffers]
    devices = sorted({b.device.index for b in module.parameters() if b.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        yield
    for buffer, value in zip(buffers, kept, strict=True):
        # Through .data, since training's own backward pass may have saved the buffer.
        buffer.data.copy_(value)
