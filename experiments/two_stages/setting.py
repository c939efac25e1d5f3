"""The study's data, network and training: rotated MNIST in two stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tda_lightning import Trajectory, TrajectoryRecorder
from tda_lightning.examples.data import MNISTData
from tda_lightning.examples.data.images import Split
from tda_lightning.examples.models import MLP, Classifier

ANGLES = ((0, 15, 30, 45), (60, 75, 90))  # of each stage, in degrees
SIZES = (2000, 1000)  # pictures of each stage
QUERIES = 75  # test pictures, turned by the angles of stage 2
EPOCHS = (5, 5)
RATES = (0.02, 0.01)
BATCH_SIZE = 50
CHECKPOINTS = 6  # of each stage
SEED = 0


@dataclass(frozen=True)
class Data:
    """Training sets of both stages; the queries; all test pictures turned as those of a stage."""

    stages: tuple[TensorDataset, TensorDataset]
    queries: TensorDataset
    tests: tuple[TensorDataset, TensorDataset]


def load(root: str | Path) -> Data:
    """No picture is in both stages; each is turned by one angle, all angles equally often."""
    train, test = MNISTData(root=str(root)).read()
    order = np.random.default_rng(SEED).permutation(len(train.labels))[: sum(SIZES)]
    first, second = np.split(order, [SIZES[0]])
    asked = np.random.default_rng(SEED + 1).permutation(len(test.labels))[:QUERIES]
    every = np.arange(len(test.labels))
    return Data(
        (turned(train, first, ANGLES[0]), turned(train, second, ANGLES[1])),
        turned(test, asked, ANGLES[1]),
        (turned(test, every, ANGLES[0]), turned(test, every, ANGLES[1])),
    )


def turned(split: Split, chosen: np.ndarray, angles: Sequence[int]) -> TensorDataset:
    """Pictures of ``split``, the angles taken in turn, scaled by MNIST's usual constants."""
    pixels = torch.from_numpy(split.images[chosen]).float()[:, None] / 255
    degrees = torch.tensor(angles).repeat(-(-len(chosen) // len(angles)))[: len(chosen)]
    pixels = (rotate(pixels, degrees) - 0.1307) / 0.3081
    return TensorDataset(pixels, torch.from_numpy(split.labels[chosen]))


def rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """Each picture [picture, 1, height, width] turned anticlockwise, the corners filled with 0."""
    turn = torch.deg2rad(degrees.float())
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    # From where in the picture each new pixel comes, the y axis pointing downwards.
    rows = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(rows, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def network(stage: int) -> Classifier:
    """As stage ``stage`` trains it, with fresh weights."""
    optimizer = partial(torch.optim.SGD, lr=RATES[stage], momentum=0.9)
    return Classifier(MLP(inputs=784, widths=[128, 64], outputs=10), optimizer)


def train(stage: int, module: Classifier, data: Dataset, folder: Path, seed: int = SEED) -> None:
    """One stage, recorded in ``folder``."""
    order = torch.Generator().manual_seed(seed)
    recorder = TrajectoryRecorder(str(folder), num_checkpoints=CHECKPOINTS, overwrite=True)
    Trainer(
        max_epochs=EPOCHS[stage],
        accelerator="cpu",
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(data, BATCH_SIZE, shuffle=True, generator=order))


def train_both(stages: Sequence[Dataset], folder: Path, seed: int = SEED) -> None:
    """Both stages from fresh weights, their runs recorded in ``folder``."""
    seed_everything(seed, verbose=False)
    before = network(0)
    train(0, before, stages[0], folder / "stage1", seed)
    module = network(1)
    module.load_state_dict(before.state_dict())
    train(1, module, stages[1], folder / "stage2", seed)


def recorded(folder: Path) -> list[Trajectory]:
    """The runs of both stages."""
    return [Trajectory.load(str(folder / name)) for name in ("stage1", "stage2")]
