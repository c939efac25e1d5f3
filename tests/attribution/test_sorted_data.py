"""Data of which the first examples are alike, and models that treat the later ones otherwise.

The oracle is TracIn by plain autograd on every example alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import TracIn
from tda_lightning.tasks import AttributionTask

SIZE, RATE = 40, 0.3
Losses = Callable[[nn.Module, list[Tensor]], Tensor]


class Module(pl.LightningModule):
    def __init__(self, losses: Losses) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.losses = losses
        self.f, self.g = nn.Linear(4, 6), nn.Linear(6, 3)
        self.double()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.losses(self, batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), RATE)


class Own(AttributionTask):
    def train_loss(self, module: nn.Module, batch: list[Tensor]) -> Tensor:
        return module.losses(module, batch)


def data() -> TensorDataset:
    """The first 36 examples have two steps, the others one or three."""
    torch.manual_seed(2)
    lengths = torch.tensor([2] * 36 + [1, 3, 2, 3])
    inputs = torch.randn(SIZE, 3, 4, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(3, (SIZE,)), lengths)


def sorted_inside(m: nn.Module, batch: list[Tensor]) -> Tensor:
    inputs, labels, lengths = batch
    order = lengths.sort(descending=True, stable=True).indices
    mask = torch.arange(3) < lengths[order, None]
    hidden = (m.f(inputs[order]).tanh() * mask[..., None]).sum(1)[order.argsort()]
    return F.cross_entropy(m.g(hidden), labels, reduction="none")


def flattened(m: nn.Module, batch: list[Tensor]) -> Tensor:
    """Only real steps go through the layers; 36 examples of two rows each look like an axis."""
    inputs, labels, lengths = batch
    mask = torch.arange(3) < lengths[:, None]
    owner = torch.arange(len(inputs))[:, None].expand_as(mask)[mask]
    each = F.cross_entropy(m.g(m.f(inputs[mask]).tanh()), labels[owner], reduction="none")
    return each.new_zeros(len(inputs)).index_add(0, owner, each)


def bucketed(m: nn.Module, batch: list[Tensor]) -> Tensor:
    """Examples of each length go through together, as bucketing models do."""
    inputs, labels, lengths = batch
    out = inputs.new_zeros(len(inputs), 6)
    for length in lengths.unique():
        mine = lengths == length
        out[mine] = m.f(inputs[mine, : int(length)]).tanh().mean(1)
    return F.cross_entropy(m.g(out), labels, reduction="none")


@pytest.mark.parametrize("losses", [sorted_inside, flattened, bucketed])
@pytest.mark.parametrize("batch_size", [4, SIZE])
def test_later_examples_are_scored_as_they_are(
    losses: Losses, batch_size: int, tmp_path: Path
) -> None:
    module, path = Module(losses), str(tmp_path / "run")
    recorder = TrajectoryRecorder(path, num_checkpoints=1)
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[recorder],
    ).fit(module, DataLoader(data(), 4))  # fmt: skip
    queries = [0, 37]
    attribution = AttributionModule(module, path, TracIn(), Own())
    found = attribution.attribute(data(), Subset(data(), queries), batch_size=batch_size)
    rows = []
    for n in range(SIZE):
        single = [tensor[n : n + 1] for tensor in data().tensors]
        gradients = torch.autograd.grad(losses(module, single).sum(), list(module.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    rate = float(Trajectory.load(path).steps.learning_rate[:, 0].sum())
    truth = rate / SIZE * torch.stack(rows)[queries] @ torch.stack(rows).T
    assert float((found.values - truth).abs().max() / truth.abs().max()) < 1e-12
    errors = attribution.check(data(), Subset(data(), queries), examples=4)
    assert max(errors.values()) < 1e-10
