"""Optimizers and small recorded runs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from tda_lightning.records.trajectory import Segment, Trajectory
from tests import oracles
from tests.cases.case import Case, normal

OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.1),
    "decay": lambda m: torch.optim.SGD(m.parameters(), 0.1, weight_decay=0.05),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.05, 0.8, weight_decay=0.05),
    "dampening": lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.8, dampening=0.3),
    "nesterov": lambda m: torch.optim.SGD(
        m.parameters(), 0.05, 0.8, nesterov=True, weight_decay=0.05
    ),
    "adam": lambda m: torch.optim.Adam(m.parameters(), 0.02, (0.8, 0.9), weight_decay=0.05),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 0.02, (0.8, 0.9), weight_decay=0.5),
    "groups": lambda m: torch.optim.SGD(
        [
            {"params": [m[2].weight, m[2].bias], "lr": 0.02, "momentum": 0.5},
            {"params": [m[0].weight, m[0].bias], "weight_decay": 0.1},
        ],
        lr=0.1,
    ),
    "adamw_groups": lambda m: torch.optim.AdamW(
        [
            {"params": m[2].parameters(), "lr": 0.01, "weight_decay": 0.5},
            {"params": [m[0].weight]},
        ],
        lr=0.02,
    ),
}

MLP = Case("mlp", lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), normal(3))
CLASSIFIER = dataclasses.replace(MLP, name="classifier", kind="classification")
LINEAR = Case("linear", lambda: nn.Linear(3, 2), normal(3))


def train(
    case: Case, optimizer, *, batches=None, checkpoints=(), seed: int = 0, **options
) -> tuple[Trajectory, nn.Module, tuple[Tensor, Tensor]]:
    """A recorded run on 10 examples, 3 shuffled epochs of batches of 4; its module and data."""
    module, data = case.build(), case.batch(10, seed)
    batches = oracles.cut_batches(10, 4, epochs=3, seed=seed) if batches is None else batches
    run = oracles.record_run(module, case.loss, data, optimizer, batches, checkpoints, **options)
    return run, module, data


def queries_of(case: Case) -> tuple[Tensor, Tensor]:
    """Three examples that the run has not seen."""
    return case.batch(3, seed=7)


def everything(
    case: Case, run: Trajectory, module: nn.Module, data: tuple[Tensor, Tensor], cuts
) -> tuple[tuple[Segment, ...], list[Tensor], dict[int, Tensor], Tensor]:
    """Segments, their mean curvature, and all gradients that SOURCE asks for.

    The queries are :func:`queries_of` the case, the measurement is the loss.
    """
    segments = run.segments(cuts)
    curvature = oracles.mean_curvature(run, segments, module, case.criterion, data)
    train_gradients = oracles.checkpoint_gradients(run, module, case.loss, data)
    last = [run.last_step]
    query = oracles.checkpoint_gradients(run, module, case.loss, queries_of(case), last)
    return segments, curvature, train_gradients, query[run.last_step]


def schedule(row: int) -> float:
    """A factor on the rates that falls with the step."""
    return 1 / (1 + 0.1 * row)
