"""Random numbers as hashes of what they belong to.

A number is a hash of (seed, draw, example, stream, position): nothing else enters, so batch size,
order, device and sharding change no draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 31  # of each number of random_integers; they fit an int32, which halves their memory


def words(
    seed: int, draw: int, examples: Tensor, stream: int, positions: int, bits: int = 64
) -> Tensor:
    """Uniform integers of so many bits, int64 [examples, positions]; of 64 bits, signed ones.

    Args:
        draw: number of the repetition with other randomness.
        examples: int64 [examples].
        stream: tells the draws for one example apart.
    """
    key = _mix(_mix(examples * _ODD + _signed(_GAMMA * seed)) + _signed(_GAMMA * (stream + 1)))
    if draw:
        key = _mix(key + _signed(_GAMMA * draw))
    counter = torch.arange(1, positions + 1, device=examples.device) * _signed(_GAMMA)
    mixed = _mix(key[:, None] + counter)
    return mixed if bits == 64 else _shift_right(mixed, 64 - bits)


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
