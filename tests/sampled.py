"""Problems for approximate curvature, and the brute-force curvature of the labels that the library
samples for them: one backward pass per example."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tda_lightning.tasks import seeded_examples
from tests import oracles
from tests.attributing import CaseTask
from tests.cases import Case
from tests.cases.case import normal
from tests.cases.training import CLASSIFIER, MLP

SEED = 5


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(4, 4, (2, 1), groups=2, padding=(1, 0), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


def sequence() -> nn.Module:
    """One layer for all positions, called twice; norms between."""
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.LayerNorm(3), nn.Tanh(), shared, nn.Tanh(), nn.Linear(3, 4))


CASES = {
    "regression": MLP,
    "classification": CLASSIFIER,
    "convolutions": Case("ekfac/conv", convolutions, normal(2, 5, 6), "classification"),
    "sequence": Case("ekfac/sequence", sequence, normal(5, 3), "classification"),
}


def sampled_loss(case: Case, run, data):
    """Loss of example n under the label sampled for it at the checkpoint that a module holds."""
    task = CaseTask(case.kind)
    first = next(iter(run.facts.parameters))

    def loss(module: nn.Module, n: int) -> Tensor:
        held = module.get_parameter(first)
        (step,) = [s for s, c in run.checkpoints.items() if torch.equal(c.parameters[first], held)]
        with seeded_examples(SEED + step, torch.tensor([n])):
            return task.sampled_loss(module, oracles.take(data, [n])).sum()

    return loss


def sampled_gradients(case: Case, run, module, data, steps) -> Tensor:
    """[examples of all checkpoints, parameters]."""
    loss, names, rows = sampled_loss(case, run, data), list(run.facts.parameters), []
    for step in steps:
        held = oracles.with_state(module, run.checkpoints[step])
        parameters = [held.get_parameter(name) for name in names]
        for n in range(len(data[0])):
            parts = torch.autograd.grad(loss(held, n), parameters, materialize_grads=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def layer_places(run) -> dict[str, Tensor]:
    """Flat coordinates of each layer's parameters."""
    sizes = [torch.Size(fact.shape).numel() for fact in run.facts.parameters.values()]
    places: dict[str, list[Tensor]] = {}
    pieces = torch.arange(sum(sizes)).split(sizes)
    for name, place in zip(run.facts.parameters, pieces, strict=True):
        places.setdefault(name.rpartition(".")[0], []).append(place)
    return {layer: torch.cat(parts) for layer, parts in places.items()}


def oracle_curvature(
    case, run, module, data, steps, kind, scale=None, basis=torch.linalg.eigh
) -> Tensor:
    """The brute-force matrix of all parameters, averaged over checkpoints."""
    gradients = sampled_gradients(case, run, module, data, steps)
    if scale is not None:
        gradients = gradients * scale
    size = gradients.shape[1]
    if kind == "identity":
        return torch.eye(size, dtype=torch.float64)
    if kind == "diagonal":
        return torch.diag(gradients.square().mean(0))
    blocks, dense = [], []
    for layer, place in layer_places(run).items():
        if isinstance(module.get_submodule(layer), nn.Linear | nn.Conv2d):
            states = [run.checkpoints[step] for step in steps]
            loss, count = sampled_loss(case, run, data), len(data[0])
            names = list(run.facts.parameters)
            blocks += oracles.kronecker_blocks(
                module, layer, loss, count, names, states, scale, basis
            )
        else:
            matrix = oracles.second_moment(gradients[:, place])
            values, vectors = (part[0] for part in basis(matrix[None]))
            if kind == "ekfac":
                values = (vectors.T @ matrix @ vectors).diagonal()
            dense.append((place, vectors * values @ vectors.T))
    return oracles.embed_blocks(blocks, size, dense, kfac=kind == "kfac")
