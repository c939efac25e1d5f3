"""Per-example gradients of losses that share one forward pass: the nodes of a graph.

Message passing mixes the rows of every layer, so no row belongs to one example and no layer's
gradient falls apart by example. What remains is the definition, a backward pass for each loss
through the graph that they share; many at once where torch can batch them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tda_lightning.records.errors import EngineError

_SCALARS = 1 << 25  # of gradients and activations' gradients that are held at once


def gradients_of_each(losses: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of each loss [batch], with its graph, which is kept: name -> [batch, *shape].

    Raises:
        EngineError: the losses depend on no parameter.
    """
    if not losses.requires_grad:
        raise EngineError(
            "The loss depends on no trained parameter. Check that the task's loss calls the module "
            "that was trained."
        )
    size = sum(parameter.numel() for parameter in parameters.values())
    directions = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    together = max(1, _SCALARS // (4 * max(1, size)))
    parts: list[Sequence[Tensor]] = []
    for some in directions.split(together):
        parts.append(_rows(losses, list(parameters.values()), some))
    return {
        name: torch.cat(rows).detach()
        for name, rows in zip(parameters, zip(*parts, strict=True), strict=True)
    }


def _rows(losses: Tensor, parameters: Sequence[Tensor], directions: Tensor) -> Sequence[Tensor]:
    try:
        found = torch.autograd.grad(
            losses,
            parameters,
            directions,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
    except RuntimeError:  # an operation (a sparse product) without a batched backward pass
        single = [_row(losses, parameters, direction) for direction in directions]
        return [torch.stack(rows) for rows in zip(*single, strict=True)]
    count = len(directions)
    return [
        p.new_zeros(count, *p.shape) if g is None else g
        for p, g in zip(parameters, found, strict=True)
    ]


def _row(losses: Tensor, parameters: Sequence[Tensor], direction: Tensor) -> Sequence[Tensor]:
    found = torch.autograd.grad(losses, parameters, direction, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)
        for p, g in zip(parameters, found, strict=True)
    ]
