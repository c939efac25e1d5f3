"""Training in a plain loop: for the many small retrainings of a study.

The same as Lightning's own loop, whose work around each step takes several times longer than a step
of so small a network (tests/experiments/test_studies.py compares them bit for bit).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tda_lightning.examples.models import TrainedModule


def descend(module: TrainedModule, data: TensorDataset, batches: Sequence[Tensor]) -> None:
    """Train ``module``, which has no scheduler, from its weights on the batches in order."""
    optimizer = module.configure_optimizers()
    module.train()
    for batch in batches:
        inputs, labels = data[batch]
        optimizer.zero_grad()
        module.loss(module(inputs), labels).backward()
        optimizer.step()
    module.eval()


def fresh_batches(examples: Tensor, epochs: int, batch_size: int) -> list[Tensor]:
    """Batches of all epochs, each in an order drawn anew by the global generator."""
    orders = (examples[torch.randperm(len(examples))] for _ in range(epochs))
    return [batch for order in orders for batch in order.split(batch_size)]
