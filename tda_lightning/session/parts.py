"""Names of the parts of a measurement (timesteps) that are scored as queries of their own."""

from __future__ import annotations

from torch import Tensor

_PART = 1 << 32  # part p of the measurement of query q has the index q + (p + 1) _PART


def part_indices(examples: Tensor, part: int) -> Tensor:
    """Indices that name a part of the measurement of each of ``examples``."""
    return examples + (part + 1) * _PART


def own_indices(indices: Tensor) -> Tensor:
    """The examples that :func:`part_indices` were made of; others stay."""
    return indices % _PART


def part_numbers(indices: Tensor) -> Tensor:
    """The parts that :func:`part_indices` name."""
    return indices // _PART - 1


def are_parts(indices: Tensor) -> bool:
    """Whether indices name parts."""
    return bool((indices >= _PART).any())
