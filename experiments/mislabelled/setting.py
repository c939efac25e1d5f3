"""The study's data, network and training: FashionMNIST of which some labels are wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments.descent import descend, fresh_batches
from tda_lightning import Trajectory, TrajectoryRecorder
from tda_lightning.examples.data import FashionMNISTData
from tda_lightning.examples.models import MLP, Classifier
from tda_lightning.runtime.random_states import unchanged_randomness

PICTURES, FLIPPED = 3000, 0.1
EPOCHS, BATCH_SIZE, RATE, MOMENTUM, DECAY = 8, 50, 0.02, 0.9, 5e-4
CHECKPOINTS = 6
SEEDS = (0, 1, 2)  # of a run: its pictures, which labels are flipped, its weights and its order


def load(root: str | Path, seed: int) -> FashionMNISTData:
    """Training pictures with flipped labels; the queries are all 10000 test pictures."""
    data = FashionMNISTData(
        root=str(root),
        num_train=PICTURES,
        flip_fraction=FLIPPED,
        subset_seed=seed,
        flip_seed=seed,
        seed=seed,
        batch_size=BATCH_SIZE,
    )
    data.setup()
    return data


def network(activation: str = "relu") -> Classifier:
    """With fresh weights."""
    optimizer = partial(torch.optim.SGD, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    return Classifier(MLP(784, [128, 64], 10, activation), optimizer)


def recorded(
    folder: Path, data: FashionMNISTData, seed: int, activation: str = "relu"
) -> Trajectory:
    """The run in ``folder``, trained if it is not there."""
    if not (folder / "recorded").exists():
        seed_everything(seed, verbose=False)
        order = torch.Generator().manual_seed(seed)
        loader = DataLoader(data.train_dataset, BATCH_SIZE, shuffle=True, generator=order)
        recorder = TrajectoryRecorder(
            str(folder / "run"), num_checkpoints=CHECKPOINTS, overwrite=True
        )
        Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=[recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(network(activation), loader)
        (folder / "recorded").touch()
    return Trajectory.load(str(folder / "run"))


def final(run: Trajectory) -> Classifier:
    """The model that the run ended with."""
    module = network().eval()
    module.load_state_dict(dict(run.checkpoints[run.last_step].parameters))
    return module


def trained_anew(inputs: Tensor, labels: Tensor, seed: int) -> Classifier:
    """On these pictures from fresh weights, in a fresh order."""
    with unchanged_randomness():
        torch.manual_seed(seed)
        module = network()
        every = torch.arange(len(labels))
        descend(module, TensorDataset(inputs, labels), fresh_batches(every, EPOCHS, BATCH_SIZE))
    return module


def accuracy(module: Classifier, data: TensorDataset) -> float:
    """Share of the pictures that are classified rightly."""
    inputs, labels = data.tensors
    with torch.no_grad():
        return float((module(inputs).argmax(1) == labels).float().mean())
