"""Many retrainings at once: models stacked along a leading axis, run by ``torch.func.vmap``.

Only for optimizers that step element by element: torch.optim itself moves the stacked weights.
What a step draws is drawn once, as it was recorded, and is the same for all models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from tda_lightning.optimizers import apply_settings, make_optimizer
from tda_lightning.replay.run import (
    Replay,
    State,
    Walk,
    initial,
    no_randomness,
    weighted_loss,
)
from tda_lightning.runtime.module_state import borrowed
from tda_lightning.runtime.random_states import Snapshot
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
    trajectory, runs = replay.trajectory, len(weights)
    stacked = _stacked(replay, runs)
    trained = {name: stacked[name].requires_grad_() for name in trajectory.facts.parameters}
    optimizer, each = make_optimizer(trajectory, trained), _each_loss(replay)
    with borrowed(replay.module), replay.as_trained():
        walk = Walk(replay)
        walk.restart(0)
        for row in range(trajectory.last_step):
            apply_settings(trajectory, optimizer, row)
            optimizer.zero_grad()
            for batch, examples, draws in walk.batches(row):
                own = weights[:, examples].to(replay.device)
                as_drawn = no_randomness() if draws is None else nullcontext()
                with seeded_examples(0, examples, own_noise=False), as_drawn:
                    found = each(stacked, own, batch)
                (found.sum() / int(trajectory.steps.accumulation[row])).backward()
            _clip(replay, trained)
            optimizer.step()
    for run in range(runs):
        state = {name: tensor[run].detach().clone() for name, tensor in stacked.items()}
        yield state


def draws_alike(replay: Replay) -> bool:
    """Whether the batches of the first step draw the same numbers for stacked models as for one:
    their losses agree, and they leave the generators in the same states."""
    if not replay.knows_randomness:
        return True
    try:
        return _first_step_alike(replay)
    except RuntimeError:  # draws that depend on the model, for which vmap has no rule
        return False


def _first_step_alike(replay: Replay) -> bool:
    each, stacked = _each_loss(replay), _stacked(replay, 2)
    with borrowed(replay.module), replay.as_trained(), torch.no_grad():
        walk = Walk(replay)
        walk.restart(0)
        for batch, examples, draws in walk.batches(0):
            assert draws is not None
            losses, after = [], []
            for stack in (False, True):
                draws.forward.restore()
                with seeded_examples(0, examples, own_noise=False):
                    ones = torch.ones(2, len(examples), device=replay.device)
                    if stack:
                        losses.append(each(stacked, ones, batch)[0])
                    else:
                        losses.append(weighted_loss(replay.task, replay.module, batch, ones[0]))
                after.append(Snapshot.take())
            close = (losses[0] - losses[1]).abs() <= 1e-4 * losses[0].abs()
            if after[0] != after[1] or not bool(close):
                return False
    return True


def _stacked(replay: Replay, runs: int) -> State:
    """Initial parameters and buffers, [runs, ...]."""
    return {
        name: tensor.to(replay.device).expand(runs, *tensor.shape).clone()
        for name, tensor in initial(replay.trajectory).items()
    }


def _each_loss(replay: Replay) -> Callable[[State, Tensor, object], Tensor]:
    """The losses [runs] of stacked models for one batch, by the weights of its examples for each
    run, [runs, batch]."""
    losses = _Losses(replay.module, replay.task)

    def batch_loss(state: State, own: Tensor, batch: object) -> Tensor:
        named = {f"module.{name}": tensor for name, tensor in state.items()}
        return torch.func.functional_call(losses, named, (batch, own))  # type: ignore[no-any-return]

    return torch.func.vmap(batch_loss, in_dims=(0, 0, None), randomness="same")


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
