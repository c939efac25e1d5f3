"""The losses of a batch with their second derivatives in the outputs of the network.

Standard losses of ``torch.nn.functional`` with weights that no parameter changes have theirs in
closed form (``standard_losses.py``). Every other loss is differentiated twice
(``output_curvature.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tda_lightning.tasks.loss_calls import WeightedLoss, inside_transform
from tda_lightning.tasks.output_curvature import Losses, OutputLoss
from tda_lightning.tasks.step_graph import Node, StepGraph

CurvedLoss: TypeAlias = WeightedLoss | OutputLoss


def run_graph(
    module: nn.Module, run: Callable[[], Tensor], zero: Tensor | None = None
) -> tuple[StepGraph, Node]:
    """The graph of what ``run()`` computes, and the node of its result."""
    graph = StepGraph(module, zero)
    with graph:
        total = run()
    return graph, graph.node(total)


def weighted_losses(
    module: nn.Module, run: Callable[[], Tensor], losses: Losses
) -> tuple[list[WeightedLoss], Node, Tensor]:
    """The standard losses in ``run()`` and the weights of their elements in the sum of ``losses``,
    with the graph of the weights; the node of the result, and the losses [batch]."""
    graph, total = run_graph(module, run)
    each = losses(total)
    summed = each.sum()
    if graph.calls and summed.requires_grad:
        weights = _derivatives(summed, graph)
    elif graph.calls and inside_transform():
        weights = _derivatives_in_transform(module, run, losses, summed)
    else:
        return [], total, each
    standard = [
        WeightedLoss(call.loss, weight, number)
        for number, (call, weight) in enumerate(zip(graph.calls, weights, strict=True))
        if weight is not None
    ]
    return standard, total, each


def all_in_closed_form(standard: Sequence[WeightedLoss], losses: Tensor) -> bool:
    """Whether standard losses with constant weights are all that the losses [batch] consist of."""
    batch = len(losses)
    with torch._C.DisableTorchFunction():  # no call of the user's that a mode should see
        if not standard or not all(loss.fits(batch) for loss in standard):
            return False
        if any(loss.weights.requires_grad for loss in standard):
            return False
        whole = torch.stack([loss.by_position(batch).sum(1) for loss in standard]).sum(0)
        difference = (whole - losses).detach().abs().max()
        eps = torch.finfo(losses.dtype).eps
        close = difference <= eps**0.6 * losses.detach().abs().max()
        # Read together: it is the only time that a batch makes the host wait for a GPU.
        return bool(torch.stack([close, *((loss.weights >= 0).all() for loss in standard)]).all())


def standard_outputs(module: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """The outputs that the standard losses in ``run()`` are of, by call, without the weights,
    which take a derivative of their own."""
    graph, _ = run_graph(module, run)
    return [call.loss.outputs for call in graph.calls]


def _derivatives(summed: Tensor, graph: StepGraph) -> Sequence[Tensor | None]:
    values = [call.loss.values for call in graph.calls]
    with torch._C.DisableTorchFunction():  # nothing of the user's that a mode should see
        return torch.autograd.grad(summed, values, create_graph=True, allow_unused=True)


def _derivatives_in_transform(
    module: nn.Module, run: Callable[[], Tensor], losses: Losses, summed: Tensor
) -> Sequence[Tensor | None]:
    """Weights under ``torch.func.vmap`` alone, where no tensor may be made to require gradients:
    a second run inside ``torch.func.grad`` of a zero that is added to every loss."""

    def probe(zero: Tensor) -> tuple[Tensor, list[Tensor]]:
        graph, total = run_graph(module, run, zero)
        weights = _derivatives(losses(total).sum(), graph)
        return zero, [
            torch.zeros_like(call.loss.values) if weight is None else weight
            for call, weight in zip(graph.calls, weights, strict=True)
        ]

    _, weights = torch.func.grad(probe, has_aux=True)(torch.zeros((), device=summed.device))
    return weights  # type: ignore[no-any-return]
