"""The works that are measured: a network, random data and one recorded run for every library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import TrajectoryRecorder

CLASSES = 10
CHECKPOINTS = (3, 6)  # recorded for TracIn and the influence function, for SOURCE


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, CLASSES),
    )


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for inside, outside in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, CLASSES))


@dataclass(frozen=True)
class Work:
    """One training set to attribute; ``scale`` shrinks it for a trial of the benchmark itself."""

    name: str
    input_shape: tuple[int, ...]
    num_train: int
    num_query: int
    batch_size: int

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return {"mlp": mlp, "cnn": cnn}[self.name]()

    def data(self) -> tuple[TensorDataset, TensorDataset]:
        """Random training examples and queries, the same in every process."""
        generator = torch.Generator().manual_seed(1)

        def draw(count: int) -> TensorDataset:
            inputs = torch.randn(count, *self.input_shape, generator=generator)
            labels = torch.randint(CLASSES, (count,), generator=generator)
            return TensorDataset(inputs, labels)

        return draw(self.num_train), draw(self.num_query)

    def scaled(self, scale: float) -> Work:
        """A smaller work of the same kind."""
        sizes = [max(8, int(n * scale)) for n in (self.num_train, self.num_query)]
        return Work(self.name, self.input_shape, *sizes, self.batch_size)


WORKS = {
    "mlp": Work("mlp", (784,), num_train=6000, num_query=200, batch_size=500),
    "cnn": Work("cnn", (3, 32, 32), num_train=2000, num_query=50, batch_size=500),
}


class Classifier(LightningModule):
    """The network as it is trained."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def record(work: Work, path: Path, num_checkpoints: int) -> None:
    """Train for a dozen steps and leave the trajectory in ``path``."""
    train, _ = work.data()
    batch_size = min(work.batch_size, work.num_train // 4)
    trainer = Trainer(
        max_steps=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TrajectoryRecorder(path, num_checkpoints=num_checkpoints)],
    )
    trainer.fit(Classifier(work.network()), DataLoader(train, batch_size, shuffle=True))
