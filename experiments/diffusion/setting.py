"""The model and the data of the study, at a toy resolution."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from tda_lightning import TrajectoryRecorder
from tda_lightning.examples.data import OutlierImages
from tda_lightning.examples.models import Denoiser, NoiseSchedule, UNet, cosine

RESULTS = Path(__file__).parent / "results"
SIZE, WIDTHS, TIMESTEPS = 8, (16, 32), (50, 200, 400, 600, 800, 950)


def denoiser(diffusers: bool = False, widths: tuple[int, ...] = WIDTHS) -> Denoiser:
    """A small U-Net: our own, or that of diffusers."""
    network: torch.nn.Module = UNet(3, widths, groups=8, heads=4)
    if diffusers:
        from diffusers import UNet2DModel

        network = UNet2DModel(
            sample_size=SIZE,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=widths,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    optimizer = partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.01)
    return Denoiser(network, NoiseSchedule(1000), optimizer, partial(cosine, warmup=0.05))


def trained(
    folder: Path, module: Denoiser, data: OutlierImages, epochs: int, checkpoints: int = 4
) -> None:
    """Train, recorded in ``folder``."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[TrajectoryRecorder(str(folder), num_checkpoints=checkpoints)],
    )
    trainer.fit(module, data)


def samples(module: Denoiser, count: int, seed: int = 1, channels: int = 3) -> Tensor:
    """Generated images, [count, channels, SIZE, SIZE]."""
    own = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, SIZE, SIZE, generator=own)
    return module.eval().sample(noise, steps=30)
