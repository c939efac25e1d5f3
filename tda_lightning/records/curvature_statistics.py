"""Curvature gathered during training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from tda_lightning.records.errors import TrajectoryFormatError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BlockStatistics:
    """Curvature of one block of parameters, summed over training examples: additive throughout.

    ``left``, ``right`` and ``count`` are the second moments of the two sides of the examples'
    gradients [groups, rows, columns], as :meth:`Gradient.covariances` gives them: left (x) right /
    count is the Kronecker approximation of the summed curvature.

    Attributes:
        parameters: names, weight first.
        shape: (groups, rows, columns).
        left: of the rows, [groups, rows, rows]; or its diagonal, or a sketch of it (SideForm).
        right: of the columns, likewise.
        count: [groups].
        trace: sum of the examples' squared norms, [1].
        examples: how many were summed, [1].
        samples: how many vectors ``left`` and ``right`` were summed over, [2].
    """

    parameters: tuple[str, ...]
    shape: tuple[int, int, int]
    left: Tensor
    right: Tensor
    count: Tensor
    trace: Tensor
    examples: Tensor
    samples: Tensor

    SUMS: ClassVar[tuple[str, ...]] = ("left", "right", "count", "trace", "examples", "samples")

    def __add__(self, other: BlockStatistics) -> BlockStatistics:
        if self._kind() != other._kind():
            raise TrajectoryFormatError(
                f"Curvature statistics of different blocks cannot be added: expected "
                f"{self._kind()}, got {other._kind()}. Restore the files from a copy, or record "
                "again."
            )
        return replace(self, **{n: getattr(self, n) + getattr(other, n) for n in self.SUMS})

    def _kind(self) -> tuple[object, ...]:
        """What two blocks have in common that can be added."""
        sides = [(name, list(getattr(self, name).shape)) for name in ("left", "right")]
        return (*self.parameters, list(self.shape), *sides)


# Curvature by block name, summed over the sampled examples of an interval (start, stop] of steps.
Statistics = Mapping[str, BlockStatistics]
