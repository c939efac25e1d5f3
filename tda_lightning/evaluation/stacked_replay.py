"""Many retrainings at once: models stacked along a leading axis, run by ``torch.func.vmap``.

Only for optimizers that step element by element: torch.optim itself moves the stacked weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tda_lightning.optimizers import apply_settings, make_optimizer
from tda_lightning.replay.run import (
    Replay,
    State,
    initial,
    no_randomness,
    weighted_loss,
)
from tda_lightning.runtime.module_state import borrowed
from tda_lightning.tasks import AttributionTask, seeded_examples


class _Losses(nn.Module):
    """A module whose forward pass gives losses, for ``functional_call`` to swap its tensors."""

    def __init__(self, module: nn.Module, task: AttributionTask) -> None:
        super().__init__()
        self.module = module
        self.task = task

    def forward(self, batch: object, weights: Tensor) -> Tensor:
        return weighted_loss(self.task, self.module, batch, weights)


def replay_stacked(replay: Replay, weights: Tensor) -> Iterator[State]:
    """One replay for each row of ``weights``, [runs, train], all in lockstep."""
    losses = _Losses(replay.module, replay.task)
    trajectory, runs = replay.trajectory, len(weights)
    stacked = {
        name: tensor.to(replay.device).expand(runs, *tensor.shape).clone()
        for name, tensor in initial(trajectory).items()
    }
    trained = {name: stacked[name].requires_grad_() for name in trajectory.facts.parameters}
    optimizer = make_optimizer(trajectory, trained)

    def batch_loss(state: State, own: Tensor, batch: object) -> Tensor:
        named = {f"module.{name}": tensor for name, tensor in state.items()}
        return torch.func.functional_call(losses, named, (batch, own))  # type: ignore[no-any-return]

    each = torch.func.vmap(batch_loss, in_dims=(0, 0, None))
    with borrowed(replay.module), replay.as_trained():
        for row in range(trajectory.last_step):
            apply_settings(trajectory, optimizer, row)
            optimizer.zero_grad()
            for number, examples in enumerate(trajectory.steps.batches(row)):
                replay.see(row, number)
                batch = replay.fetch(examples)
                own = weights[:, examples].to(replay.device)
                with seeded_examples(0, examples, own_noise=False), no_randomness():
                    found = each(stacked, own, batch)
                (found.sum() / int(trajectory.steps.accumulation[row])).backward()
            _clip(replay, trained)
            optimizer.step()
    for run in range(runs):
        state = {name: tensor[run].detach().clone() for name, tensor in stacked.items()}
        yield state


def _clip(replay: Replay, trained: State) -> None:
    """Clip each run's gradient by its own norm, as ``torch.nn.utils`` does for one."""
    gradients = [tensor.grad for tensor in trained.values() if tensor.grad is not None]
    if not replay.clip or not gradients:
        return
    if replay.clip_by_value:
        torch.nn.utils.clip_grad_value_(list(trained.values()), replay.clip)
        return
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    factors = (replay.clip / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
