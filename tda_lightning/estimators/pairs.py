"""Inner products of each example's own two gradients: what self-influence is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from tda_lightning.curvature import Spectrum
from tda_lightning.gradients import Gradient, Rows


def paired(
    measured: Gradient, trained: Gradient, spectrum: Spectrum | None, weight: Tensor | None
) -> Tensor:
    """sum_ij weight_ij m~_ij g~_ij for each example, in the spectrum's basis: [batch]."""
    left = None if spectrum is None else spectrum.left
    right = None if spectrum is None else spectrum.right
    if measured is trained:
        return trained.weighted_squares(left, right, weight)
    if isinstance(measured, Rows) and isinstance(trained, Rows) and left is None:
        return measured.paired(trained, right, weight)
    parts = []
    for rows in trained.chunks():
        product = measured.rotated(rows, left, right) * trained.rotated(rows, left, right)
        product = product if weight is None else product * weight
        parts.append(product.flatten(1).sum(1))
    return torch.cat(parts)
