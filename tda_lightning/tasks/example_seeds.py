"""Randomness for sampled labels that belongs to the example, not to the batch it came in.

Noise is drawn with a number that is a hash of (seed, index of the example in its data set, loss
within the task, position within the example). Batch size, order, device and sharding therefore
change nothing: two passes over the same data fit the same curvature.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_BITS = 31  # of each hash; they fit an int32, which halves the memory of unpacking them

_ACTIVE: ContextVar[tuple[int, Tensor] | None] = ContextVar("seeded_examples", default=None)


@contextmanager
def seeded_examples(seed: int, examples: Tensor) -> Iterator[None]:
    """Draw the noise of this batch from (seed, example) alone while the context is active.

    Args:
        seed: any integer.
        examples: index in the data set of each example of the batch, int64 [batch].
    """
    if examples.dim() != 1 or examples.is_floating_point():
        raise ValueError(
            "seeded_examples expects the data-set indices of the batch as an integer tensor "
            f"[batch], got {examples.dtype} of shape {list(examples.shape)}."
        )
    token = _ACTIVE.set((seed, examples.long()))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_examples() -> Tensor | None:
    """Indices given to the active :func:`seeded_examples`, [batch]; None outside of one."""
    active = _ACTIVE.get()
    return None if active is None else active[1]


def random_integers(batch: int, positions: int, stream: int, device: torch.device) -> Tensor:
    """Uniform integers in [0, 2^31), [batch, positions].

    Outside :func:`seeded_examples` they come from torch's global generator.

    Args:
        stream: tells the losses of one task apart.
    """
    active = _ACTIVE.get()
    if active is None:
        return torch.randint(1 << _BITS, (batch, positions), device=device)
    seed, examples = active
    if len(examples) != batch:
        raise ValueError(
            f"seeded_examples was given {len(examples)} indices for a batch of {batch} examples: "
            "give one index for each example."
        )
    examples = examples.to(device)
    key = _mix(_mix(examples * _ODD + _signed(_GAMMA * seed)) + _signed(_GAMMA * (stream + 1)))
    counter = torch.arange(1, positions + 1, device=device) * _signed(_GAMMA)
    return _shift_right(_mix(key[:, None] + counter), 64 - _BITS)


def random_signs(
    batch: int, positions: int, count: int, stream: int, device: torch.device
) -> Tensor:
    """+1 or -1 with equal probability, int32 [batch, positions, count].

    Variance 1, with the smallest fourth moment that variance 1 allows.
    """
    words = -(-count // _BITS)
    integers = random_integers(batch, positions * words, stream, device).to(torch.int32)
    places = torch.arange(_BITS, dtype=torch.int32, device=device)
    bits = (integers.view(batch, positions, words, 1) >> places) & 1
    return 1 - 2 * bits.flatten(2)[..., :count]


def _signed(value: int) -> int:
    """The int64 with the same low 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
# int64 products wrap around like unsigned ones, so torch needs no unsigned type for it.
_GAMMA = 0x9E3779B97F4A7C15
_ODD = _signed(0xD1342543DE82EF95)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 shifts copy the sign bit, which the mask removes."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _FACTORS[0]
    value = (value ^ _shift_right(value, 27)) * _FACTORS[1]
    return value ^ _shift_right(value, 31)
