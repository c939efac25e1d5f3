"""Measurement gradients of the queries, dense, in as many rounds as memory asks for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tda_lightning.curvature import units
from tda_lightning.passes import Context, memory_budget


def query_rounds(context: Context, copies: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries whose ``copies`` dense gradients fit the memory budget together."""
    size = sum(block.size for block in context.blocks)
    item = torch.finfo(context.dtype).bits // 8
    fitting = max(1, memory_budget() // (size * item * copies))
    rounds = -(-context.num_query // fitting)
    for number in range(rounds):
        yield (
            number * context.num_query // rounds,
            (number + 1) * context.num_query // rounds,
        )


def query_gradients(context: Context, kind: str, start: int, stop: int) -> dict[str, Tensor]:
    """Measurement gradients at the weights in place, by unit: [query, groups, rows, columns]."""
    parts: dict[str, list[Tensor]] = {}
    for batch, examples in context.queries(start, stop):
        found = context.measurement_gradients(batch, examples)
        for name, gradient in units(kind, found.blocks).items():
            parts.setdefault(name, []).append(gradient.dense(slice(None)).to(context.dtype))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}
