"""NumPy's random functions, drawing for each example of a batch: see ``step_noise.py``.

They are replaced by their names in ``numpy.random``, so what was imported from there by itself
(``from numpy.random import randn``) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np
import torch

from tda_lightning.runtime.seeded_generators import drawn_from_numpy

# The place of ``size`` among the arguments.
_SIZES = {
    "beta": 2,
    "binomial": 2,
    "chisquare": 1,
    "choice": 1,
    "dirichlet": 1,
    "exponential": 1,
    "gamma": 2,
    "geometric": 1,
    "gumbel": 2,
    "laplace": 2,
    "logistic": 2,
    "lognormal": 2,
    "multinomial": 2,
    "normal": 2,
    "poisson": 1,
    "randint": 2,
    "random": 0,
    "random_sample": 0,
    "standard_exponential": 0,
    "standard_gamma": 1,
    "standard_normal": 0,
    "standard_t": 1,
    "triangular": 3,
    "uniform": 2,
}


class Numbers(Protocol):
    """Where the numbers of one call come from."""

    def seeds(self, shape: Sequence[int]) -> tuple[int | None, list[int]]:
        """The axis of ``shape`` that holds the examples, with a seed for each; or None, with one
        for all."""

    def permutation(self, count: int, device: torch.device) -> torch.Tensor:
        """Of 0 to count - 1."""

    def integers(self, shape: Sequence[int], high: int, device: torch.device) -> torch.Tensor:
        """0 to high - 1."""


_numbers: ContextVar[Callable[[], Numbers]] = ContextVar("numpy_numbers")


@contextmanager
def numpy_drawing_from(numbers: Callable[[], Numbers]) -> Iterator[None]:
    """Let the functions of ``numpy.random`` draw from ``numbers()`` while active, once something
    was seen to use them."""
    if not drawn_from_numpy():
        yield
        return
    token = _numbers.set(numbers)
    before = {name: getattr(np.random, name) for name in _REPLACED}
    _set(_REPLACED)
    try:
        yield
    finally:
        _set(before)
        _numbers.reset(token)


def _set(functions: dict[str, Callable[..., Any]]) -> None:
    for name, function in functions.items():
        setattr(np.random, name, function)


def _sized(name: str, place: int) -> Callable[..., Any]:
    def draw(*args: Any, **kwargs: Any) -> Any:
        size = kwargs.pop("size", None)
        if len(args) > place:
            size = args[place]
            args = (*args[:place], *args[place + 1 :])
        return _drawn(name, args, size, _numbers.get()(), place, **kwargs)

    return draw


def _drawn(
    name: str, args: tuple[Any, ...], size: Any, numbers: Numbers, place: int = 0, **kwargs: Any
) -> Any:
    arrays = [np.shape(value) for value in (*args, *kwargs.values())]
    whole = size is not None or name in ("choice", "dirichlet", "multinomial")
    shape = _shape(size) if whole else np.broadcast_shapes(*arrays)
    if (integers := _integers(name, args, shape, numbers, **kwargs)) is not None:
        return integers
    axis, seeds = numbers.seeds(shape)
    if axis is None or (not whole and axis != 0):
        return _call(name, seeds[0], args, place, size, kwargs)
    rest = (*shape[:axis], *shape[axis + 1 :])
    rows = []
    for number, seed in enumerate(seeds):
        own, named = args, kwargs
        if not whole:
            own = tuple(_row(value, number, shape) for value in args)
            named = {key: _row(value, number, shape) for key, value in kwargs.items()}
        rows.append(_call(name, seed, own, place, rest if rest or whole else None, named))
    return np.stack(rows, axis)


def _integers(
    name: str,
    args: tuple[Any, ...],
    shape: tuple[int, ...],
    numbers: Numbers,
    low: Any = None,
    high: Any = None,
    a: Any = None,
    p: object = None,
    replace: bool = True,
    dtype: Any = int,
) -> Any:
    """Integers of a range, which may choose examples of the batch; None for other calls."""
    cpu = torch.device("cpu")
    if name == "randint":
        bounds = [*args[:2]] or [0 if low is None else low]
        bounds += [high] * (high is not None and len(bounds) < 2)
        if any(value is None for value in bounds[1:]):
            bounds = bounds[:1]
        low, high = (0, bounds[0]) if len(bounds) == 1 else bounds
        if np.ndim(low) or np.ndim(high):
            return None
        drawn = int(low) + numbers.integers(shape, int(high) - int(low), cpu).numpy()
        return drawn.astype(args[2] if len(args) > 2 else dtype)[()]
    chosen = args[0] if args else a
    if name != "choice" or np.ndim(chosen) or p is not None or len(args) > 1:
        return None
    if replace:
        return numbers.integers(shape, int(chosen), cpu).numpy()[()]
    return numbers.permutation(int(chosen), cpu).numpy() if shape == (chosen,) else None


def _call(
    name: str, seed: int, args: tuple[Any, ...], place: int, size: Any, kwargs: dict[str, Any]
) -> Any:
    named = kwargs if size is None else {**kwargs, "size": size}
    if size is not None and len(args) > place:  # what follows the size
        args, named = (*args[:place], size, *args[place:]), kwargs
    return getattr(np.random.RandomState(seed), name)(*args, **named)


def _shape(size: Any) -> tuple[int, ...]:
    if size is None:
        return ()
    return (int(size),) if np.ndim(size) == 0 else tuple(int(length) for length in size)


def _row(value: Any, number: int, shape: Sequence[int]) -> Any:
    """The part of an array of parameters that belongs to an example."""
    own = np.shape(value)
    return value[number] if len(own) == len(shape) and own[0] == shape[0] else value


def _permuted(x: Any, numbers: Numbers) -> Any:
    count = int(x) if np.ndim(x) == 0 else len(x)
    order = numbers.permutation(count, torch.device("cpu")).numpy()
    return order if np.ndim(x) == 0 else np.asarray(x)[order]


def _shuffle(x: Any, numbers: Numbers) -> None:
    order = numbers.permutation(len(x), torch.device("cpu")).tolist()
    x[:] = x[order] if isinstance(x, np.ndarray) else [x[place] for place in order]


_REPLACED: dict[str, Callable[..., Any]] = {
    **{name: _sized(name, place) for name, place in _SIZES.items()},
    "rand": lambda *size: _drawn("random", (), size or None, _numbers.get()()),
    "randn": lambda *size: _drawn("standard_normal", (), size or None, _numbers.get()()),
    "permutation": lambda x: _permuted(x, _numbers.get()()),
    "shuffle": lambda x: _shuffle(x, _numbers.get()()),
}
