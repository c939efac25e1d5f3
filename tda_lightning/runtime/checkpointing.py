"""Reentrant activation checkpointing (``use_reentrant=True``) run without its second forward pass.

It allows ``.backward()`` only, and per-example gradients ask ``torch.autograd.grad``. Run plainly,
the values and the gradients are the same, and the activations are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor


class _Plain:
    """Stands in for ``torch.utils.checkpoint.CheckpointFunction``."""

    @staticmethod
    def apply(function: Callable[..., object], preserve: bool, *args: object) -> object:
        """``function(*args)``; without gradients where no argument has one, as in training."""
        tracked = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        with torch.set_grad_enabled(tracked and torch.is_grad_enabled()):
            return function(*args)


@contextmanager
def without_reentrant_checkpoints() -> Iterator[None]:
    """Within it, ``checkpoint(..., use_reentrant=True)`` calls its function."""
    before = checkpointing.CheckpointFunction
    checkpointing.CheckpointFunction = _Plain  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        checkpointing.CheckpointFunction = before  # type: ignore[misc]


def _run_plainly(*args: object, **kwargs: object) -> Iterator[None]:
    """Stands in for what ``checkpoint(..., use_reentrant=False)`` does around its function."""
    yield


@contextmanager
def without_recomputation() -> Iterator[None]:
    """Within it, ``checkpoint(..., use_reentrant=False)`` calls its function.

    Its second run comes with the backward pass, outside of whatever makes the function draw its
    random numbers.
    """
    name = "_checkpoint_without_reentrant_generator"
    before = getattr(checkpointing, name)
    setattr(checkpointing, name, _run_plainly)
    try:
        yield
    finally:
        setattr(checkpointing, name, before)
