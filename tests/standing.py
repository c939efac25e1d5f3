"""Runs that stand still: a trajectory in memory whose checkpoints all hold a module's own weights,
and the scores of TracIn at them by plain autograd, one example at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning import AttributionModule, Scores
from tda_lightning.estimators import TracIn
from tda_lightning.records.trajectory import (
    Checkpoint,
    Facts,
    ParameterFact,
    Steps,
    Trajectory,
)
from tests.attributing import quiet


def standing_run(
    module: nn.Module,
    batches: Sequence[Sequence[int]],
    epochs: Sequence[int] | None = None,
    **settings: Any,
) -> Trajectory:
    """A run of SGD whose rates sum to 1, a step for each of ``batches``, without any movement."""
    rows = len(batches)
    parameters = {name: value.detach().clone() for name, value in module.named_parameters()}
    buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
    facts = Facts(
        {
            name: ParameterFact(tuple(value.shape), str(value.dtype).removeprefix("torch."), 0)
            for name, value in parameters.items()
        },
        "SGD",
        1 + max(max(batch) for batch in batches),
        settings=settings,
    )
    zeros = torch.zeros(rows, 1, dtype=torch.float64)
    hyper = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    lengths = torch.tensor([0, *map(len, batches)])
    steps = Steps(
        epoch=torch.tensor(epochs or [0] * rows),
        learning_rate=torch.full((rows, 1), 1 / rows, dtype=torch.float64),
        hyperparameters=dict.fromkeys(hyper, zeros),
        loss=zeros[:, 0],
        gradient_norm=zeros[:, 0],
        batch_offsets=torch.arange(rows + 1),
        example_offsets=lengths.cumsum(0),
        examples=torch.tensor([index for batch in batches for index in batch]),
        accumulation=torch.ones(rows, dtype=torch.int64),
    )
    held = {step: Checkpoint(step, parameters, buffers) for step in range(rows + 1)}
    return Trajectory(facts, steps, {0: held[0], rows: held[rows]})


def tracin(
    module: nn.Module, run: Trajectory, train: object, query: object, **given: Any
) -> Scores:
    """Scores of TracIn at the only checkpoint."""
    attribution = AttributionModule(module, run, TracIn())
    return attribution.attribute(train, query, trainer=quiet(), **given)


def by_hand(module: nn.Module, train: Sequence[Tensor], query: Sequence[Tensor]) -> Tensor:
    """What they must be: the products of plain gradients of the losses, over the number of them."""
    module.eval()
    rows = [_gradients(module, losses) for losses in (train, query)]
    return rows[1] @ rows[0].T / len(train)


def _gradients(module: nn.Module, losses: Sequence[Tensor]) -> Tensor:
    wanted = [p for p in module.parameters() if p.requires_grad]
    grads = [
        torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True)
        for loss in losses
    ]
    return torch.stack([torch.cat([part.flatten() for part in each]) for each in grads])
