"""A tiny denoiser in float64, a recorded run of it, and its losses and gradients written out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import Trajectory
from tda_lightning.examples.models import Denoiser, NoiseSchedule, UNet
from tda_lightning.tasks import numbered_draw, seeded_examples
from tests.runs import fit

TRAIN, BATCH, RATE, TIMES = 6, 3, 0.05, 20


def images(count: int = TRAIN, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64))


def denoiser(network: nn.Module | None = None, predicts: str = "epsilon") -> Denoiser:
    torch.manual_seed(1)
    network = network or UNet(channels=1, widths=(4, 8), groups=2, heads=2)
    sgd = partial(torch.optim.SGD, lr=RATE)
    return Denoiser(network, NoiseSchedule(TIMES, last=0.3, prediction_type=predicts), sgd).double()


def recorded(path: Path, module: Denoiser) -> Trajectory:
    """Two epochs in two batches each, with two checkpoints."""
    fit(
        path,
        lambda: DataLoader(images(), BATCH, shuffle=True),
        module=module,
        recorder={"num_checkpoints": 2},
        max_epochs=2,
    )
    return Trajectory.load(str(path))


def loss(module: Any, clean: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """Of each image [batch], for a module that predicts the noise."""
    kept = module.scheduler.alphas_cumprod[times].reshape(-1, 1, 1, 1)
    predicted = module(kept**0.5 * clean + (1 - kept) ** 0.5 * noise, times)
    return (predicted - noise).pow(2).flatten(1).mean(1)


def drawn_loss(module: Any, clean: Tensor, example: int, draw: int, seed: int = 0) -> Tensor:
    """Of one image, alone: its own timestep and noise."""
    with numbered_draw(draw), seeded_examples(seed, torch.tensor([example])):
        times = torch.randint(0, TIMES, (1,))
        noise = torch.randn_like(clean)
    return loss(module, clean, times, noise)


def gradient(module: Any, run: Trajectory, step: int, value: Any) -> Tensor:
    """Of ``value()`` by all parameters at a checkpoint, flat."""
    module.eval()
    module.load_state_dict(
        {**run.checkpoints[step].parameters, **run.checkpoints[step].buffers}, strict=False
    )
    parameters = list(module.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(value(), parameters)])


def unit(vector: Tensor) -> Tensor:
    return F.normalize(vector, dim=0)
