"""What curvature depends on besides its own settings, as one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tda_lightning.session.session import Session


def digest_of(context: Session, steps: Sequence[int], batch: Any, indices: Tensor) -> str:
    """Digest of weights, data, task and code, as far as it can be seen.

    Code is seen by what it computes: the losses of the first examples at each checkpoint.
    """
    digest = hashlib.sha256()
    held = context.trajectory.last_step
    for step in steps:
        context.load(step)
        for name, value in sorted(context.module.state_dict().items()):
            digest.update(name.encode())
            plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(plain.numpy().tobytes())
        with torch.no_grad():
            losses = context.train_loss(context.module, batch, indices)
        digest.update(json.dumps([f"{loss:.3e}" for loss in losses.tolist()]).encode())
    context.load(held)
    facts = context.trajectory.facts
    about = [facts.num_examples, dict(facts.fingerprint or {}), context.task.settings()]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    return digest.hexdigest()
