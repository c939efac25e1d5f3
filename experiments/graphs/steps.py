r"""Why does unlearning leave some models farther from the retrained weights than they were?

For 5% of the edges and one seed: the step of unlearning beside steps with the exact curvature, each
against two ways of training again. From fresh weights a non-convex model may end in another basin,
which no derivative at the old weights knows of; from the trained weights it is the nearest optimum
that is found. In float64, on the first 16 principal components, so that the curvature can be dense.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.graphs.cora import Graph, Layers, ids, load
from tda_lightning.edits import RemoveEdges

COMPONENTS, SHARE, DAMPING = 16, 0.05, 1e-3
STEPS, LONG = 200, 600


def steps(root: str, folder: Path) -> dict[str, Any]:
    """Rows of GCN, GAT and GIN, trained as in the study of unlearning and for longer."""
    graph = load(root, COMPONENTS, torch.float64)
    pairs = graph["edge_index"].T
    present = [(u, v) for u, v in pairs[pairs[:, 0] < pairs[:, 1]].tolist()]
    own = torch.Generator().manual_seed(0)
    order = torch.randperm(len(present), generator=own).tolist()
    count = round(SHARE * len(present))
    edited = {
        "5% of edges": RemoveEdges([present[n] for n in order[:count]]).applied(graph),
        "1 edge": RemoveEdges(present_near(graph, present)).applied(graph),
    }
    rows = []
    for kind in ("GCN", "GAT", "GIN"):
        for length in (STEPS, LONG):
            torch.manual_seed(0)
            start = Layers(kind, COMPONENTS).double()
            trained = train(start, graph, length)
            here = Here(trained, graph)
            for what, changed in edited.items():
                row = measured(start, here, graph, changed, length)
                rows.append({"model": kind, "steps": length, "removed": what, **row})
                print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


class Here:
    """The trained model with its curvature, and where training it on leads."""

    def __init__(self, trained: Layers, graph: Graph) -> None:
        self.module = trained
        self.weights = flat(trained.parameters())
        self.gradient = gradient(trained, graph)
        self.hessian, self.gauss_newton = hessian(trained, graph), gauss_newton(trained, graph)
        self.trained_on = flat(train(trained, graph, LONG).parameters()) - self.weights


def present_near(graph: Graph, present: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first edge of a training node."""
    train_nodes = set(ids(graph, "train").tolist())
    return [next(edge for edge in present if train_nodes & set(edge))]


def measured(start: Layers, at: Here, graph: Graph, changed: Graph, length: int) -> dict[str, Any]:
    """One request: the steps, and how they compare with training again."""
    trained, here, before = at.module, at.weights, at.gradient
    after, decay = gradient(trained, changed), trained.decay
    identity = torch.eye(len(here), dtype=here.dtype)
    eigenvalues = torch.linalg.eigvalsh(at.hessian + decay * identity)
    delta = before - after  # both with the decay's part, which cancels
    lifted = decay + max(DAMPING, DAMPING - float(eigenvalues[0]))
    damped = decay + DAMPING
    moves = {
        "unlearning": torch.linalg.solve(at.gauss_newton + damped * identity, delta),
        "exact curvature": torch.linalg.solve(at.hessian + lifted * identity, delta),
        # What is left of the gradient too, with the curvature after the edit: Newton's step.
        "Newton after the edit": -torch.linalg.solve(
            gauss_newton(trained, changed) + damped * identity, after
        ),
    }
    targets = {
        "fresh": flat(train(start, changed, length).parameters()) - here,
        "warm": flat(train(trained, changed, LONG).parameters()) - here,
        "unedited": at.trained_on,
    }
    found: dict[str, Any] = {
        "gradient left": float(before.norm()),
        "gradient of the edit": float(delta.norm()),
        "smallest eigenvalue": float(eigenvalues[0]),
        "negative eigenvalues": int((eigenvalues < 0).sum()),
        "objective": {"before": objective_at(trained, here, changed)},
        "lengths": {name: float(move.norm()) for name, move in {**moves, **targets}.items()},
    }
    # What the edit alone moves: both are trained on from the same weights.
    targets["warm, less training on"] = targets["warm"] - targets["unedited"]
    for name, move in moves.items():
        found["objective"][name] = objective_at(trained, here + move, changed)
        found[name] = {
            target: {
                "recovered": float(1 - (move - wanted).norm() / wanted.norm()),
                "cosine": float(F.cosine_similarity(move, wanted, dim=0)),
                "best scale": float(move @ wanted / (move @ move)),
            }
            for target, wanted in targets.items()
            if target != "unedited"
        }
    for name in ("fresh", "warm"):
        found["objective"][name] = objective_at(trained, here + targets[name], changed)
    return found


def objective(module: Layers, graph: Graph) -> Tensor:
    """The mean loss of the training nodes, and the weight decay's part."""
    nodes = ids(graph, "train")
    decayed = sum(value.square().sum() for value in module.parameters())
    loss: Tensor = F.cross_entropy(module(graph)[nodes], graph["y"][nodes])
    return loss + module.decay / 2 * decayed


def train(module: Layers, graph: Graph, length: int) -> Layers:
    """A copy, trained by the module's optimizer."""
    own = copy.deepcopy(module)
    optimizer = own.configure_optimizers()
    nodes = ids(graph, "train")
    for _ in range(length):
        optimizer.zero_grad()
        F.cross_entropy(own(graph)[nodes], graph["y"][nodes]).backward()
        optimizer.step()
    return own


def gradient(module: Layers, graph: Graph) -> Tensor:
    """Of the objective, all parameters in a row."""
    return flat(torch.autograd.grad(objective(module, graph), list(module.parameters())))


def outputs_at(module: Layers, graph: Graph) -> tuple[Tensor, Tensor]:
    """All parameters in a row, and the logits of the training nodes as a function of them."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    row = flat(parameters).requires_grad_()
    parts = row.split([value.numel() for value in parameters])
    own = {n: part.view_as(v) for n, part, v in zip(names, parts, parameters, strict=True)}
    logits: Tensor = torch.func.functional_call(module, own, (graph,))
    return row, logits[ids(graph, "train")]


def hessian(module: Layers, graph: Graph) -> Tensor:
    """Of the mean loss, dense."""
    row, logits = outputs_at(module, graph)
    loss = F.cross_entropy(logits, graph["y"][ids(graph, "train")])
    (slope,) = torch.autograd.grad(loss, row, create_graph=True)
    return each_gradient(slope, row)


def gauss_newton(module: Layers, graph: Graph) -> Tensor:
    """The Gauss-Newton matrix of the mean loss, dense."""
    row, logits = outputs_at(module, graph)
    jacobian = each_gradient(logits.flatten(), row).view(*logits.shape, -1)
    chances = logits.detach().softmax(1)
    mean = torch.einsum("nc,ncp->np", chances, jacobian)
    spread = (chances.sqrt()[..., None] * jacobian).flatten(0, 1)
    return (spread.T @ spread - mean.T @ mean) / len(logits)


def each_gradient(values: Tensor, row: Tensor) -> Tensor:
    """Of every value, [value, parameter]."""
    each = [torch.autograd.grad(one, row, retain_graph=True)[0] for one in values.unbind()]
    return torch.stack(each)


def objective_at(module: Layers, row: Tensor, graph: Graph) -> float:
    """The objective at other weights."""
    own = copy.deepcopy(module)
    nn.utils.vector_to_parameters(row, own.parameters())
    with torch.no_grad():
        return float(objective(own, graph))


def flat(tensors: Any) -> Tensor:
    """All numbers in a row."""
    return torch.cat([value.detach().flatten() for value in tensors])
