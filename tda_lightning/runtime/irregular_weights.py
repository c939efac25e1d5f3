"""Weights that tell several terms of a sum apart: what they weigh together betrays each of them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def irregular_weights(batch: int, like: Tensor, seed: int = 0) -> Tensor:
    """Weights of the examples, far from one another, from zero and from each other's means:
    [batch], of both signs, between 1 and 2 in size."""
    return _irregular_weights(batch, seed).to(like.detach())


@lru_cache(maxsize=64)
def _irregular_weights(batch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((batch << 1) + seed)
    jitter = torch.rand(batch, generator=generator, dtype=torch.float64) / 2 + 0.25
    sizes = 1 + (torch.arange(batch, dtype=torch.float64) + jitter) / batch
    signs = 1 - 2.0 * torch.randint(2, (batch,), generator=generator)
    order = torch.randperm(batch, generator=generator)
    return (sizes * signs)[order]
