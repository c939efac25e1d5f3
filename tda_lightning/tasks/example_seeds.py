"""Randomness that belongs to the example, not to the batch it came in.

What is drawn is a hash (``hashes.py``) of (seed, index of the example in its data set, loss or call
within the task, position within the example). Batch size, order, device and sharding therefore
change nothing: two passes over the same data fit the same curvature. This holds for the labels
that curvature samples, and for what the user's own loss draws (``step_noise.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from tda_lightning.tasks.hashes import BITS, words
from tda_lightning.tasks.step_noise import restarted_by, step_noise


class _Active(NamedTuple):
    seed: int
    draw: int
    examples: Tensor


_SIGN_BIT, _ONE = -(1 << 31), 0x3F800000  # of a float32, as an int32

MEASURED_SEED = -1  # of the noise of measurements: a query's is not that of a training example

_ACTIVE: ContextVar[_Active | None] = ContextVar("seeded_examples", default=None)
_DRAW: ContextVar[int] = ContextVar("draw", default=0)


@contextmanager
def numbered_draw(number: int) -> Iterator[None]:
    """Other noise for every ``number`` in :func:`seeded_examples` while the context is active."""
    token = _DRAW.set(number)
    try:
        yield
    finally:
        _DRAW.reset(token)


@contextmanager
def seeded_examples(seed: int, examples: Tensor, own_noise: bool = True) -> Iterator[None]:
    """Draw the noise of this batch from (seed, example) alone while the context is active.

    Args:
        seed: any integer.
        examples: index in the data set of each example of the batch, int64 [batch].
        own_noise: also what the user's loss draws itself. False where it is to draw from the
            process's generators, as in training.
    """
    if examples.dim() != 1 or examples.is_floating_point():
        raise ValueError(
            "seeded_examples expects the data-set indices of the batch as an integer tensor "
            f"[batch], got {examples.dtype} of shape {list(examples.shape)}."
        )
    examples, draw = examples.long(), _DRAW.get()
    token = _ACTIVE.set(_Active(seed, draw, examples))
    try:
        with step_noise(seed, draw, examples) if own_noise else restarted_by(None):
            yield
    finally:
        _ACTIVE.reset(token)


def active_examples() -> Tensor | None:
    """Indices given to the active :func:`seeded_examples`, [batch]; None outside of one."""
    active = _ACTIVE.get()
    return None if active is None else active.examples


def active_seed() -> int:
    """Seed given to the active :func:`seeded_examples`; 0 outside of one."""
    active = _ACTIVE.get()
    return 0 if active is None else active.seed


def random_integers(batch: int, positions: int, stream: int, device: torch.device) -> Tensor:
    """Uniform integers in [0, 2^31), [batch, positions].

    Outside :func:`seeded_examples` they come from torch's global generator.

    Args:
        stream: tells the losses of one task apart.
    """
    active = _ACTIVE.get()
    if active is None:
        return torch.randint(1 << BITS, (batch, positions), device=device)
    examples = active.examples
    if len(examples) != batch:
        raise ValueError(
            f"seeded_examples was given {len(examples)} indices for a batch of {batch} examples: "
            "give one index for each example."
        )
    return words(active.seed, active.draw, examples.to(device), stream, positions, BITS)


def random_signs(
    batch: int, positions: int, count: int, stream: int, device: torch.device
) -> Tensor:
    """+1 or -1 with equal probability, float32 [batch, positions, count].

    Variance 1, with the smallest fourth moment that variance 1 allows.
    """
    words = -(-count // BITS)
    with torch._C.DisableTorchFunction():  # no call of the user's that a mode should see
        integers = random_integers(batch, positions * words, stream, device).to(torch.int32)
        # Bit by bit to the place of the sign in a float32, and all other bits those of 1.0.
        places = torch.arange(31, 31 - BITS, -1, dtype=torch.int32, device=device)
        bits = integers.view(batch, positions, words, 1) << places
        signs = bits.bitwise_and_(_SIGN_BIT).bitwise_or_(_ONE).view(torch.float32)
        return signs.flatten(2)[..., :count]
