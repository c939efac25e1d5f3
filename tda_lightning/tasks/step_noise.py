"""Noise that a training step draws, made to belong to the example and not to the batch.

While :class:`StepNoise` is active, torch's random functions give hashes (``hashes.py``) of

- (seed, draw, example, number of the call) along the axis of a draw that holds the examples;
- (seed, draw, number of the call) where none does: one mixing weight for a whole batch;
- for a permutation of the batch, of the examples' ranks: each example has the same partner in
  whatever order the batch comes.

So a batch, the batch reversed and an example alone see the same noise for the same example, and so
does every pass over the data.

Which axis holds the examples is told by the length of the batch. A length that agrees by chance is
found out as soon as the same line of code was run on a batch of another size; what is known of a
line serves batches of one, where every axis of length 1 would do.

NumPy's functions do the same (``numpy_noise.py``). What is drawn from Python's ``random``, or where
nobody can see it, comes from generators that are seeded alike in every run of the step: one number
for the whole batch is right then; noise for single examples belongs to their places in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tda_lightning.runtime.checkpointing import without_recomputation
from tda_lightning.runtime.seeded_generators import SeededGenerators
from tda_lightning.tasks.draw_sites import Site, Sites
from tda_lightning.tasks.hashes import words
from tda_lightning.tasks.noise_rules import RULES, Pass
from tda_lightning.tasks.numpy_noise import numpy_drawing_from

UNSEEN = frozenset({"torch", "NumPy", "Python"})  # kinds of noise that is nobody's own
_STREAM = 1 << 40  # beyond those of sampled labels
_SHARED = -1  # the index that stands for the whole batch
_ROWS = -1  # the layout of a first axis that holds several rows of each example
_axes: dict[Site, tuple[int, ...]] = {}  # that held the examples in every batch so far
_restart: ContextVar[Callable[[], None] | None] = ContextVar("restart_noise", default=None)
_watching: ContextVar[set[str] | None] = ContextVar("watching_noise", default=None)


@contextmanager
def watching_noise() -> Iterator[set[str]]:
    """What kinds of random numbers are drawn by seeded steps while active.

    The set fills with ``example`` (noise of each example), ``batch`` (a number that the examples of
    a batch share), ``partners`` (other examples of the batch are chosen), and ``torch``, ``NumPy``
    and ``Python`` for a generator that was drawn from unseen.
    """
    seen: set[str] = set()
    token = _watching.set(seen)
    try:
        yield seen
    finally:
        _watching.reset(token)


def noise_of(
    loss: Callable[[object, Tensor], object],
    batch: object,
    examples: Tensor,
    fewer: Callable[[], tuple[object, Tensor]],
) -> frozenset[str]:
    """What kinds of random numbers a seeded loss draws, as :func:`watching_noise` has them.

    It learns on the way which axes of draws hold the examples, from batches of two sizes.

    Args:
        fewer: gives a batch that is an example smaller.
    """
    with watching_noise() as seen, torch.no_grad():
        try:
            loss(batch, examples)
            if "NumPy" in seen:  # from here on it draws for the example
                seen.clear()
                loss(batch, examples)
            if seen and len(examples) > 1:
                loss(*fewer())
        except Exception:  # what comes next says what is wrong
            pass
    return frozenset(seen)


def restart_noise() -> None:
    """Begin a run of the step: the same calls draw the same noise as in the run before."""
    if (restart := _restart.get()) is not None:
        restart()


@contextmanager
def step_noise(seed: int, draw: int, examples: Tensor) -> Iterator[None]:
    """Draw the noise of a step from (seed, draw, example) while active."""
    watched = _watching.get() is not None
    generators = SeededGenerators(watched)
    noise = StepNoise(seed, draw, examples, generators)
    try:
        with ExitStack() as stack:
            if _axes:  # some step draws; its noise is not there when a checkpoint recomputes
                stack.enter_context(without_recomputation())
            stack.enter_context(restarted_by(noise.restart))
            stack.enter_context(numpy_drawing_from(noise.numbers))
            stack.enter_context(noise)
            yield
        if watched:
            note(*generators.drawn_from())
    finally:
        generators.restore()


@contextmanager
def restarted_by(restart: Callable[[], None] | None) -> Iterator[None]:
    """What :func:`restart_noise` does while active; None: nothing."""
    token = _restart.set(restart)
    try:
        yield
    finally:
        _restart.reset(token)


def note(*kinds: str) -> None:
    """Tell those who are :func:`watching_noise`."""
    if (seen := _watching.get()) is not None:
        seen.update(kinds)


class StepNoise(TorchFunctionMode):
    """Replaces what torch's random functions draw; see :func:`step_noise`."""

    def __init__(
        self, seed: int, draw: int, examples: Tensor, generators: SeededGenerators
    ) -> None:
        super().__init__()
        self.seed, self.draw, self.examples = seed, draw, examples
        self.generators = generators
        self._number = 0  # of calls so far
        self._sites = Sites()
        self.restart()

    def restart(self) -> None:
        """Count calls from 0."""
        self._number = 0
        self._sites.restart()
        self.generators.seed(words_as_seed(self.seed, self.draw))

    def numbers(self) -> _Numbers:
        """The numbers of a call."""
        return _Numbers(self, self._sites.following)

    def __torch_function__(  # type: ignore[override]
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None:
            return func(*args, **kwargs)
        try:
            return rule(self.numbers(), *args, **kwargs)
        except Pass:
            return func(*args, **kwargs)


class _Numbers:
    """The numbers of one call: see ``noise_rules.Numbers``."""

    def __init__(self, noise: StepNoise, site: Callable[[], Site]) -> None:
        self._noise, self._find = noise, site
        self._site: Site | None = None
        self._number = self._part = 0

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        with torch._C.DisableTorchFunction():
            whole = self._words(shape, self._axis(shape), 53, device)
            return (whole.double() + 0.5) * 2.0**-53

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        uniform = self.uniform(shape, device)
        with torch._C.DisableTorchFunction():
            return torch.special.ndtri(uniform)

    def integers(self, shape: Sequence[int], high: int, device: torch.device) -> Tensor:
        with torch._C.DisableTorchFunction():
            # A range as long as the batch chooses examples.
            chooses = self._axis((high,), of="range") is not None
            found = self._words(shape, self._axis(shape), 63, device) % high
            return self._positions(device)[found] if chooses else found

    def permutation(self, count: int, device: torch.device) -> Tensor:
        with torch._C.DisableTorchFunction():
            chooses = self._axis((count,)) is not None
            order = self._words((count,), None, 63, device).argsort()
            if not chooses or count != len(self._noise.examples):
                return order
            # order[r]: the rank of the partner of the example of rank r.
            positions = self._positions(device)
            return positions[order[positions.argsort()]]

    def seeds(self, shape: Sequence[int]) -> tuple[int | None, list[int]]:
        """See ``numpy_noise.Numbers``."""
        with torch._C.DisableTorchFunction():
            axis = self._axis(shape)
            if axis is None or axis == _ROWS:
                return None, self._words((1,), None, 32, torch.device("cpu")).tolist()
            count = len(self._noise.examples)
            return axis, self._words((count,), 0, 32, torch.device("cpu")).tolist()

    def _positions(self, device: torch.device) -> Tensor:
        """Where the example of each rank is in the batch."""
        note("partners")
        return self._noise.examples.to(device).argsort(stable=True)

    def _words(
        self, shape: Sequence[int], axis: int | None, bits: int, device: torch.device
    ) -> Tensor:
        noise, shape = self._noise, list(shape)
        stream = _STREAM + (self._number << 10) + self._part
        self._part += 1
        if axis is None:
            note("batch")
            examples = torch.full((1,), _SHARED, device=device)
            rest = shape
        else:
            note("example")
            examples = noise.examples.to(device)
            rest = shape[:axis] + shape[axis + 1 :]
            if axis == _ROWS:
                rest = [shape[0] // len(examples), *shape[1:]]
        drawn = words(noise.seed, noise.draw, examples, stream, prod(rest), bits)
        if axis is None or axis == _ROWS:
            return drawn.reshape(shape)
        return drawn.reshape(len(examples), *rest).movedim(0, axis)

    def _axis(self, shape: Sequence[int], of: str = "shape") -> int | None:
        """The axis that holds the examples; None where none does."""
        if self._site is None:
            self._site = self._find()
            self._number = self._noise._number
            self._noise._number += 1
        file, line, hit = self._site
        site = (f"{of} in {file}", line, hit)
        batch = len(self._noise.examples)
        found = tuple(axis for axis, length in enumerate(shape) if length == batch)
        if shape and shape[0] != batch and shape[0] % batch == 0 and of == "shape":
            found = (*found, _ROWS)
        known = _axes.get(site)
        if known is not None:
            found = tuple(axis for axis in found if axis in known)
        elif batch == 1:
            found = tuple(axis for axis in found if axis == 0)
        if batch > 1:
            _axes[site] = found
        return found[0] if found else None


def words_as_seed(seed: int, draw: int) -> int:
    """One number that stands for both."""
    return (seed * 1_000_003 + draw) & ((1 << 62) - 1)
