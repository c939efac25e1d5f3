r"""SGC without approximation: its optimum by Newton's method, and its influence by the Hessian.

With rows x of the propagated features the loss is convex in W, and at its optimum
:math:`W = X^\top \alpha` with :math:`n \lambda \alpha + p(X X^\top \alpha) - Y = 0`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.graphs.cora import CLASSES, Graph, ids, propagate


def propagated(graph: Graph) -> Tensor:
    """Features that are propagated twice."""
    return propagate(graph["edge_index"], propagate(graph["edge_index"], graph["x"]))


def optimum(
    features: Tensor, labels: Tensor, decay: float, denominator: int, weights: Tensor | None = None
) -> Tensor:
    """The weights [features, classes] that training tends to, to rounding."""
    gram, count = features @ features.T, len(labels)
    wanted = F.one_hot(labels, CLASSES).to(features)
    scale = decay * denominator
    logits = features @ weights if weights is not None else torch.zeros_like(wanted)
    alpha = (wanted - logits.softmax(1)) / scale
    for _ in range(50):
        chances = (gram @ alpha).softmax(1)
        error = scale * alpha + chances - wanted
        if float(error.abs().max()) < 1e-12:
            break
        curved = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
        jacobian = torch.einsum("nab,nm->namb", curved, gram).reshape(count * CLASSES, -1)
        jacobian.diagonal().add_(scale)
        step = torch.linalg.solve(jacobian, error.flatten()).view_as(alpha)
        size, before = 1.0, float(error.norm())
        while size > 1e-4:  # half steps where a full one overshoots
            tried = alpha - size * step
            if float((scale * tried + (gram @ tried).softmax(1) - wanted).norm()) < before:
                break
            size /= 2
        alpha = alpha - size * step
    return features.T @ alpha


def responses(graph: Graph, weights: Tensor, decay: float, queries: Tensor) -> Tensor:
    """(H + lambda)^-1 times the gradient of the mean validation loss, [features, classes]."""
    features = propagated(graph)
    own = features[ids(graph, "train")]
    chances = (own @ weights).softmax(1)
    curved = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
    hessian = torch.einsum("np,nab,nq->paqb", own, curved, own) / len(own)
    size = features.shape[1] * CLASSES
    matrix = hessian.reshape(size, size)
    matrix.diagonal().add_(decay)
    asked = features[queries]
    error = (asked @ weights).softmax(1) - F.one_hot(graph["y"][queries], CLASSES).to(asked)
    gradient = (asked.T @ error / len(queries)).reshape(-1)
    return torch.linalg.solve(matrix, gradient).view(-1, CLASSES)


def summed_gradient(graph: Graph, weights: Tensor, nodes: Tensor) -> Tensor:
    """Gradient of the summed losses of some nodes."""
    rows = propagated(graph)[nodes]
    error = (rows @ weights).softmax(1) - F.one_hot(graph["y"][nodes], CLASSES).to(rows)
    return rows.T @ error
