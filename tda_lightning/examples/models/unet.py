"""A small U-Net in the manner of DDPM, and a LightningModule that trains it to remove noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.examples.models.blocks import Attention
from tda_lightning.examples.models.modules import (
    OptimizerFactory,
    SchedulerFactory,
    TrainedModule,
)


class NoiseSchedule:
    """How much of the signal is left at each timestep: the linear schedule of DDPM.

    Args:
        num_timesteps: T.
        first, last: the variance added at the first and the last timestep.
        prediction_type: what networks trained on it predict, "epsilon" or "v_prediction".

    Attributes:
        alphas_cumprod: alpha-bar, the share of the variance that is signal, [timestep].
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        first: float = 1e-4,
        last: float = 0.02,
        prediction_type: str = "epsilon",
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction_type must be 'epsilon' or 'v_prediction', got {prediction_type!r}."
            )
        betas = torch.linspace(first, last, num_timesteps, dtype=torch.float64)
        self.alphas_cumprod = (1 - betas).cumprod(0)
        self.config = {"prediction_type": prediction_type, "num_train_timesteps": num_timesteps}

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Images [batch, ...] with the noise of their timesteps [batch]."""
        kept = self._kept(clean, timesteps)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is to predict."""
        if self.config["prediction_type"] == "epsilon":
            return noise
        kept = self._kept(clean, timesteps)
        return kept.sqrt() * noise - (1 - kept).sqrt() * clean

    def clean(self, noisy: Tensor, predicted: Tensor, kept: Tensor) -> Tensor:
        """The image that a prediction stands for."""
        if self.config["prediction_type"] == "epsilon":
            return (noisy - (1 - kept).sqrt() * predicted) / kept.sqrt()
        return kept.sqrt() * noisy - (1 - kept).sqrt() * predicted

    def _kept(self, like: Tensor, timesteps: Tensor) -> Tensor:
        table = self.alphas_cumprod.to(device=like.device, dtype=like.dtype)
        return table[timesteps].reshape(-1, *[1] * (like.dim() - 1))


class UNet(nn.Module):
    """Residual blocks that know the timestep, halving the image on the way down and doubling it on
    the way up, with attention in the middle.

    Takes noisy images [batch, channel, height, width] and timesteps [batch]; gives images.

    Args:
        channels: of the images.
        widths: channels at each resolution, multiples of ``groups``.
        groups: of the group normalisations.
        heads: of the attention in the middle.
    """

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (32, 64),
        groups: int = 8,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if not widths or any(width % groups for width in widths):
            raise ValueError(f"widths must be multiples of groups={groups}, got {list(widths)}.")
        embedding = 2 * widths[0]
        self.width = widths[0]
        self.time = nn.Sequential(
            nn.Linear(widths[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.halving, self.doubling = nn.ModuleList(), nn.ModuleList()
        before = widths[0]
        for width in widths:
            self.down.append(ResidualBlock(before, width, embedding, groups))
            self.up.insert(0, ResidualBlock(2 * width, before, embedding, groups))
            before = width
        for width in widths[:-1]:
            self.halving.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        for width in reversed(widths[:-1]):
            self.doubling.append(nn.Conv2d(width, width, 3, padding=1))
        self.middle = MiddleBlock(widths[-1], embedding, groups, heads)
        self.last_norm = nn.GroupNorm(groups, widths[0])
        self.last = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        time = self.time(sinusoids(timesteps, self.width).to(noisy.dtype))
        hidden = self.first(noisy)
        skipped = []
        for number, block in enumerate(self.down):
            hidden = block(hidden, time)
            skipped.append(hidden)
            if number < len(self.halving):
                hidden = self.halving[number](hidden)
        hidden = self.middle(hidden, time)
        for number, block in enumerate(self.up):
            hidden = block(torch.cat([hidden, skipped.pop()], 1), time)
            if number < len(self.doubling):
                hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
                hidden = self.doubling[number](hidden)
        return self.last(F.silu(self.last_norm(hidden)))


class ResidualBlock(nn.Module):
    """Two convolutions, normalised in groups, with the timestep added between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(embedding, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        added = self.conv1(F.silu(self.norm1(hidden))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(hidden) + self.conv2(F.silu(self.norm2(added)))


class MiddleBlock(nn.Module):
    """A residual block, and attention of the image's places to each other."""

    def __init__(self, width: int, embedding: int, groups: int, heads: int) -> None:
        super().__init__()
        self.residual = ResidualBlock(width, width, embedding, groups)
        self.norm = nn.GroupNorm(groups, width)
        self.attention = Attention(width, heads, dropout=0.0)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        hidden = self.residual(hidden, time)
        places = self.norm(hidden).flatten(2).transpose(1, 2)  # [batch, place, channel]
        unseen = torch.zeros((), dtype=torch.bool, device=hidden.device)
        return hidden + self.attention(places, unseen).transpose(1, 2).reshape(hidden.shape)


def sinusoids(timesteps: Tensor, width: int) -> Tensor:
    """Sines and cosines of timesteps [batch] at falling frequencies, float64 [batch, width]."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.double()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.sin(), angles.cos()], 1)


class Denoiser(TrainedModule):
    """A network trained to remove noise: each step draws a timestep and noise for each image.

    Args:
        network: takes noisy images and timesteps and gives what ``noise_schedule`` asks for, as a
            tensor or, like the models of diffusers, under ``sample``.
        noise_schedule: of the noise; the attribute ``scheduler`` of the module.
        optimizer, scheduler: see :class:`~tda_lightning.examples.models.TrainedModule`.
    """

    def __init__(
        self,
        network: nn.Module,
        noise_schedule: NoiseSchedule,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__(network, optimizer, scheduler)
        self.scheduler = noise_schedule

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:  # type: ignore[override]
        output = self.network(noisy, timesteps)
        return getattr(output, "sample", output)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        loss = self._loss(batch[0])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.log("val_loss", self._loss(batch[0]), prog_bar=True, batch_size=len(batch[0]))

    def _loss(self, clean: Tensor) -> Tensor:
        noise = torch.randn_like(clean)
        count = len(self.scheduler.alphas_cumprod)
        timesteps = torch.randint(0, count, (len(clean),), device=clean.device)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        return F.mse_loss(self(noisy, timesteps), self.scheduler.target(clean, noise, timesteps))

    @torch.no_grad()
    def sample(self, noise: Tensor, steps: int = 50) -> Tensor:
        """Images made from ``noise`` [image, ...] in so many deterministic steps (DDIM: Song et
        al., 2021, 2010.02502, eq. 12 with sigma = 0)."""
        table = self.scheduler.alphas_cumprod.to(noise)
        times = torch.linspace(len(table) - 1, 0, steps).round().long()
        hidden = noise
        for number, time in enumerate(times.tolist()):
            kept = table[time]
            after = table[times[number + 1]] if number + 1 < steps else torch.ones_like(kept)
            predicted = self(hidden, torch.full((len(noise),), time, device=noise.device))
            clean = self.scheduler.clean(hidden, predicted, kept).clamp(-1, 1)
            left = (hidden - kept.sqrt() * clean) / (1 - kept).sqrt()
            hidden = after.sqrt() * clean + (1 - after).sqrt() * left
        return hidden
