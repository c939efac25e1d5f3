"""Weights of training examples: what all of them obey, and the nearest that do."""

from __future__ import annotations

import torch
from torch import Tensor


def project(values: Tensor, bound: float) -> Tensor:
    r"""The weights nearest to ``values``, [train], that lie between 0 and ``bound`` and sum to N.

    .. math::
        w_n = \min(\max(v_n - \tau, 0), b), \qquad \tau: \sum_n w_n = N

    The sum falls with :math:`\tau` in straight pieces between the values where a weight reaches 0
    or b, so the piece is found by bisection over them and :math:`\tau` by a division.

    Raises:
        ValueError: a value is not finite, or ``bound`` is below 1, so that no weights sum to N.

    Example:
        >>> project(torch.tensor([1.0, 2.0, 6.0]), bound=2.0).round().long()
        tensor([0, 1, 2])
    """
    if not bound >= 1:
        raise ValueError(f"bound must be at least 1, so that weights can sum to N; got {bound}.")
    if values.dim() != 1 or not len(values) or not bool(values.isfinite().all()):
        raise ValueError(
            "Expected one finite number for each training example, got a tensor of shape "
            f"{list(values.shape)} with {int((~values.isfinite()).sum())} that are not finite."
        )
    total, exact = float(len(values)), values.double()

    def at(shift: Tensor) -> Tensor:
        return (exact - shift).clamp(0.0, bound)

    corners = torch.cat([exact, exact - bound]).sort().values
    low, high = 0, len(corners) - 1  # the sum is at least N at the first, at most N at the last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if float(at(corners[middle]).sum()) >= total else (low, middle)
    inside = at((corners[low] + corners[high]) / 2)
    free = (inside > 0) & (inside < bound)
    shift = corners[low]
    if bool(free.any()):
        held = float((inside >= bound).sum()) * bound
        shift = (exact[free].sum() + held - total) / free.sum()
    return at(shift).to(values.dtype)


def check_weights(weights: Tensor, num_train: int) -> Tensor:
    """The weights, float64 [train], if a training set can be weighted with them.

    Raises:
        ValueError: of another length, not finite, negative, or 0 for all.
    """
    given = torch.as_tensor(weights, dtype=torch.float64)
    if given.shape != (num_train,):
        raise ValueError(
            f"weights must be one number for each of {num_train} training examples, got a tensor "
            f"of shape {list(given.shape)}."
        )
    if not bool(given.isfinite().all()):
        first = int((~given.isfinite()).nonzero()[0])
        raise ValueError(f"The weight of training example {first} is {float(given[first])}.")
    if bool((given < 0).any()):
        first = int((given < 0).nonzero()[0])
        raise ValueError(
            f"{int((given < 0).sum())} weights are negative (the first: {float(given[first]):.4g} "
            f"for training example {first}). Training on them would unlearn; give 0 to leave an "
            "example out."
        )
    if not bool(given.any()):
        raise ValueError(f"All {num_train} weights are 0: nothing would be trained on.")
    return given
