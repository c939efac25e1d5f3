"""Linear datamodeling scores on the losses of generated samples.

A small U-Net is trained on 120 digits until it knows them by heart, and generates samples. The
measurement of a sample is its loss, a mean over many fixed timesteps and draws of the noise. Truth
is training on random halves, in two ways:

- *replays*: the recorded run with weight 0 on what is left out, so that order, timesteps and noise
  are the same and nothing else changes;
- *other seeds*: the same of runs with other initial weights, order, timesteps and noise.

How well the runs agree among themselves is the ceiling. What has been trained is kept in the run's
folder, so that the study can be taken up again.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments.diffusion.setting import RESULTS, SIZE
from tda_lightning import Trajectory, TrajectoryRecorder
from tda_lightning.evaluation import draw_subsets, measure, retrain_each, seed_ceiling
from tda_lightning.evaluation.linear_datamodeling import rank_correlation
from tda_lightning.examples.data import MNISTData
from tda_lightning.examples.models import Denoiser, NoiseSchedule, UNet, cosine
from tda_lightning.tasks import DiffusionTask

DIGITS, EACH, BATCH, EPOCHS, QUERIES = (0, 1, 7), 40, 24, 300, 16
TIMESTEPS, DRAWS = (50, 150, 300, 500, 750), 16
TOGETHER = 20  # runs that are trained at once


def images(root: str) -> TensorDataset:
    """Digits of 8 x 8 pixels in -1 .. 1."""
    train, _ = MNISTData(root=root).read()
    pixels = torch.from_numpy(train.images).float() / 127.5 - 1
    pixels = F.avg_pool2d(F.pad(pixels[:, None], (2, 2, 2, 2), value=-1.0), 32 // SIZE)
    chosen = [(torch.from_numpy(train.labels) == d).nonzero().squeeze(1)[:EACH] for d in DIGITS]
    return TensorDataset(pixels[torch.cat(chosen)])


def network() -> Denoiser:
    """18,000 weights."""
    optimizer = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01)
    return Denoiser(UNet(1, (8, 16)), NoiseSchedule(1000), optimizer, partial(cosine, warmup=0.05))


def recorded(
    folder: Path, data: TensorDataset, seed: int, epochs: int
) -> tuple[Denoiser, Trajectory]:
    """The run of a seed, and its module at its end."""
    seed_everything(seed, verbose=False)
    module = network()
    if not (folder / "done").exists():
        Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[TrajectoryRecorder(str(folder), num_checkpoints=8)],
        ).fit(module, DataLoader(data, BATCH, shuffle=True))
        (folder / "done").touch()
    run = Trajectory.load(str(folder))
    module.load_state_dict(run.checkpoints[run.last_step].parameters, strict=False)
    return module.eval(), run
