"""A training loop in torch alone, and a comparison of what the recorder wrote with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tda_lightning.records.trajectory import Trajectory
from tests.runs import Numbered

# Batches of example indices, epoch by epoch.
Epochs = Sequence[Sequence[Sequence[int]]]


class Small(LightningModule):
    """Regression without randomness, with buffers that count."""

    def __init__(self, optimizers: Any = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
        self.optimizers_of = optimizers or (lambda net: torch.optim.SGD(net.parameters(), 0.1, 0.9))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = loss_of(self.net, batch)
        self.log("loss", loss, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", loss_of(self.net, batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self.net)


def loss_of(net: nn.Module, batch: Any) -> Tensor:
    x, y = batch[0], batch[1]
    return (net(x.to(next(net.parameters()).dtype)) - y).square().mean()


def epochs(count: int = 2, size: int = 22, batch: int = 4, limit: int | None = None) -> Epochs:
    """What a loader without shuffling hands out."""
    one = [list(range(first, min(first + batch, size))) for first in range(0, size, batch)]
    return [one[:limit]] * count


@dataclass
class Log:
    """One entry for each step that happened; ``states`` begins with the initial one."""

    epoch: list[int] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    momenta: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    clipping: list[float] = field(default_factory=list)
    batches: list[list[list[int]]] = field(default_factory=list)
    accumulation: list[int] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    skipped: int = 0


def norm_of(net: nn.Module) -> float:
    gradients = [p.grad.float().reshape(-1) for p in net.parameters() if p.grad is not None]
    return float(torch.cat(gradients).norm())


def train(
    net: nn.Module,
    data: Epochs,
    optimizer: Any,
    *,
    scheduler: Any = None,
    interval: str = "epoch",
    monitor: bool = False,
    accumulate: Callable[[int], int] = lambda epoch: 1,
    clip: Callable[[list[nn.Parameter]], Any] | None = None,
    dtype: torch.dtype | None = None,
    scaler: Any = None,
    loss: Callable[[nn.Module, Any], Tensor] = loss_of,
    before_epoch: Callable[[int, Any], None] = lambda epoch, optimizer: None,
    max_steps: int | None = None,
) -> Log:
    """Train ``net`` in place.

    Args:
        monitor: the scheduler is given the epoch's mean loss.
        dtype: of autocast.
    """
    log, dataset = Log(), Numbered()
    log.states.append(copy.deepcopy(net.state_dict()))
    net.train()
    for epoch, batches in enumerate(data):
        before_epoch(epoch, optimizer)
        divisor, seen, losses = accumulate(epoch), [], []
        total, count = 0.0, 0
        for number, indices in enumerate(batches):
            batch = (dataset.x[indices], dataset.y[indices])
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
                value = loss(net, batch)
            if number % divisor == 0:
                optimizer.zero_grad()
            scaled = value / divisor
            (scaled if scaler is None else scaler.scale(scaled)).backward()
            seen.append(list(indices))
            losses.append(value.item())
            total, count = total + value.item() * len(indices), count + len(indices)
            if (number + 1) % divisor and number + 1 < len(batches):
                continue
            if scaler is not None:
                scaler.unscale_(optimizer)
            before = norm_of(net)
            if clip is not None:
                clip([p for p in net.parameters() if p.grad is not None])
            after = norm_of(net)
            rates = [group["lr"] for group in optimizer.param_groups]
            momentum = optimizer.param_groups[0].get("momentum", 0.0)
            if scaler is None:
                optimizer.step()
                took = True
            else:
                took = all(bool(p.grad.isfinite().all()) for p in net.parameters())
                scaler.step(optimizer)
                scaler.update()
            if took:
                log.epoch.append(epoch)
                log.rates.append(rates)
                log.momenta.append(momentum)
                log.losses.append(sum(losses) / len(losses))
                log.norms.append(before)
                log.clipping.append(after / before)
                log.batches.append(seen)
                log.accumulation.append(divisor)
                log.states.append(copy.deepcopy(net.state_dict()))
            else:
                log.skipped += 1
            seen, losses = [], []
            if scheduler is not None and interval == "step":
                scheduler.step()
            if max_steps is not None and len(log.epoch) + log.skipped >= max_steps:
                return log
        if scheduler is not None and interval == "epoch":
            scheduler.step(*([total / count] if monitor else []))
    return log


def require_agreement(trajectory: Trajectory, log: Log, prefix: str = "net.") -> None:
    """Every column, and the state after every step that has a checkpoint, bit for bit."""
    steps = trajectory.steps
    assert steps.epoch.tolist() == log.epoch
    assert [list(map(float, row)) for row in log.rates] == steps.learning_rate.tolist()
    if "momentum" in steps.hyperparameters:
        assert steps.hyperparameters["momentum"][:, 0].tolist() == log.momenta
    torch.testing.assert_close(steps.loss, torch.tensor(log.losses).double())
    torch.testing.assert_close(
        steps.gradient_norm, torch.tensor(log.norms).double(), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        steps.clipping, torch.tensor(log.clipping).double(), rtol=1e-5, atol=0
    )
    if len(steps.examples):
        recorded = [[b.tolist() for b in steps.batches(row)] for row in range(len(steps))]
        assert recorded == log.batches
    assert steps.accumulation.tolist() == log.accumulation
    assert trajectory.last_step == len(log.epoch)
    for step, checkpoint in trajectory.checkpoints.items():
        held = {**checkpoint.parameters, **checkpoint.buffers}
        assert held.keys() == {prefix + name for name in log.states[step]}
        for name, value in log.states[step].items():
            assert torch.equal(held[prefix + name], value), (step, name)
