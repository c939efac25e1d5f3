"""What curvature depends on besides its own settings, as one digest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tda_lightning.runtime.digests import digest
from tda_lightning.session.session import Session

# Of how the examples' gradients are made: raised when they become others than before.
_GRADIENTS = 2


def digest_of(context: Session, steps: Sequence[int], batch: object, indices: Tensor) -> str:
    """Digest of weights, data, task and code, as far as they can be observed.

    Code is observed through what it computes: the losses of the first examples at each checkpoint.
    """
    trajectory = context.trajectory
    states = []
    for step in steps:
        context.load(step)
        with torch.no_grad():
            losses = context.train_loss(context.module, batch, indices)
        rounded = [f"{loss:.3e}" for loss in losses.tolist()]
        states.append([digest(sorted(context.module.state_dict().items())), rounded])
    context.load(trajectory.last_step)
    if context.noise:
        states.append([*sorted(context.noise), f"{context.draws} draws"])
    facts = trajectory.facts
    settings = context.task.settings()
    return digest([_GRADIENTS, states, facts.num_examples, facts.fingerprint, settings])
