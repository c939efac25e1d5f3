"""Computations that keep their precision where a network runs in half (``bf16-mixed``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` outside of autocast, which would run its matrix products in half precision.

    Example:
        >>> @full_precision
        ... def squared(matrix):
        ...     return matrix @ matrix
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     squared(torch.eye(2)).dtype
        torch.float32
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run
