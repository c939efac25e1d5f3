"""Per-example losses and gradients, one example at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tda_lightning.records.trajectory import Checkpoint, Trajectory

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error averaged over an example's outputs, [batch]."""
    return (outputs - targets).square().reshape(len(outputs), -1).mean(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy averaged over an example's positions whose label is not -100, [batch].

    Args:
        logits: [batch, ..., class].
        labels: [batch, ...].
    """
    kept = labels != -100
    losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    kept, losses = kept.reshape(len(labels), -1), losses.reshape(len(labels), -1)
    return (losses * kept).sum(1) / kept.sum(1)


def loss_of(criterion: Criterion) -> Loss:
    """The loss [batch] of a module on batches (input, target)."""
    return lambda module, batch: criterion(module(batch[0]), batch[1])


def take(data: Batch, indices: Sequence[int] | Tensor) -> Batch:
    """The examples ``indices`` of nested tensors that all have the example axis first."""
    chosen = torch.as_tensor(indices)
    return tree_map(lambda tensor: tensor[chosen], data)


def num_examples(data: Batch) -> int:
    return len(tree_leaves(data)[0])


def trained(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def flatten(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Gradients by name, each [batch, *shape], as one matrix [batch, parameters]."""
    return torch.cat([tensors[name].reshape(len(tensors[name]), -1) for name in names], 1)


def per_example_gradients(
    module: nn.Module, loss: Loss, batch: Batch, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The gradient of each example's loss by a backward pass of its own, name -> [batch, *shape].

    Each example is run as a batch of one, so nothing of another can leak into it.
    """
    names = trained(module) if names is None else names
    parameters = dict(module.named_parameters())
    rows = []
    for number in range(num_examples(batch)):
        value = loss(module, take(batch, [number])).sum()
        rows.append(
            torch.autograd.grad(
                value,
                [parameters[name] for name in names],
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return {
        name: torch.stack([row[position] for row in rows]) for position, name in enumerate(names)
    }


def with_state(module: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """A copy of ``module`` in eval mode that holds the checkpoint's parameters and buffers."""
    module = copy.deepcopy(module).eval()
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in {**checkpoint.parameters, **checkpoint.buffers}.items():
            own[name].copy_(tensor)
    return module


def checkpoint_gradients(
    trajectory: Trajectory,
    module: nn.Module,
    loss: Loss,
    data: Batch,
    steps: Sequence[int] | None = None,
) -> dict[int, Tensor]:
    """Per-example gradients [batch, parameters] by checkpoint step; all checkpoints if None."""
    names = list(trajectory.facts.parameters)
    return {
        step: flatten(
            per_example_gradients(
                with_state(module, trajectory.checkpoints[step]), loss, data, names
            ),
            names,
        )
        for step in (sorted(trajectory.checkpoints) if steps is None else steps)
    }
