"""Second moments of one side of a block, as dense as its width allows.

All three forms add up: the sum of two parts' moments is the moment of the whole, over batches,
intervals and processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SideForm:
    """How the second moment sum_x x x^T of a side is summed.

    ====== ========================= ========================================================
    full   [groups, width, width]    sum_x x x^T
    axes   [groups, width]           its diagonal
    sketch [groups, width, rank + 1] sum_x x (x^T Omega), and the diagonal in the last column
    ====== ========================= ========================================================

    with Omega a fixed :func:`random_test_matrix` (Tropp et al. 2017, 1706.05736, section 2).
    """

    kind: Literal["full", "axes", "sketch"]
    rank: int = 0

    def moment(self, samples: Tensor) -> Tensor:
        """The sum over ``samples`` [chunk, groups, positions, width], by group."""
        if self.kind == "axes":
            return samples.square().sum((0, 2))
        # Copies, where needed at all, that run along the memory: transposing ones cost more than
        # the product.
        if samples.stride(3) == 1:
            flat = samples.transpose(0, 1).flatten(1, 2)
            columns = flat.transpose(1, 2)
        else:
            columns = samples.permute(1, 3, 0, 2).flatten(2)
            flat = columns.transpose(1, 2)
        if self.kind == "full":
            return _gram(columns, flat)
        omega = _cached_test_matrix(flat.shape[2], self.rank, flat.device, flat.dtype)
        diagonal = samples.square().sum((0, 2)).unsqueeze(2)
        return torch.cat([columns @ (flat @ omega), diagonal], dim=2)

    def trace(self, moment: Tensor) -> Tensor:
        """Trace of a moment in this form: [groups]."""
        if self.kind == "full":
            return moment.diagonal(dim1=1, dim2=2).sum(-1)
        return (moment if self.kind == "axes" else moment[..., -1]).sum(-1)


FULL, AXES = SideForm("full"), SideForm("axes")
_STRIP = 128  # rows: a moment of five strips takes 15 of 25 products of strips


def _gram(columns: Tensor, flat: Tensor) -> Tensor:
    """columns @ flat of ``flat`` [groups, samples, width] and its transpose: strips of rows from
    the diagonal on, mirrored."""
    groups, width, _ = columns.shape
    if width <= _STRIP:
        return columns @ flat
    out = columns.new_empty(groups, width, width)
    for start in range(0, width, _STRIP):
        strip = slice(start, start + _STRIP)
        out[:, strip, start:] = columns[:, strip] @ flat[:, :, start:]
        out[:, start + _STRIP :, strip] = out[:, strip, start + _STRIP :].mT
    return out


def random_test_matrix(width: int, rank: int) -> Tensor:
    """Omega [width, rank] in float64, normal entries of variance 1 / width.

    It depends on width and rank alone, on every machine: sketches that are summed, now or from a
    file, must share it. numpy promises that this generator's stream does not change.
    """
    values = np.random.RandomState(0).standard_normal((width, rank)) / math.sqrt(width)
    return torch.from_numpy(values)


@lru_cache(maxsize=8)  # drawing it takes as long as a batch's products with it
def _cached_test_matrix(width: int, rank: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return random_test_matrix(width, rank).to(device, dtype)
