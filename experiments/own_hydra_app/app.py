"""A Hydra application of one's own that selects an estimator of tda-lightning.

python experiments/own_hydra_app/app.py
python experiments/own_hydra_app/app.py estimator=tracin learning_rate=0.05
python experiments/own_hydra_app/app.py --multirun estimator=source,tracin,influence
"""

import hydra
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, TrajectoryRecorder


class Line(LightningModule):
    """A network that learns a curve; nothing in it knows of attribution."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.network = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Train on a sine curve with one wrong point, and ask who misled the query beside it."""
    seed_everything(0, verbose=False)
    x = torch.linspace(-3, 3, 60).unsqueeze(1)
    y = torch.sin(x)
    y[40] += 3
    train, query = TensorDataset(x, y), TensorDataset(x[39:40], torch.sin(x[39:40]))

    module = Line(config.learning_rate)
    recorder = TrajectoryRecorder(config.trajectory)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=config.epochs, accelerator="cpu", callbacks=[recorder], **quiet)
    trainer.fit(module, DataLoader(train, batch_size=10, shuffle=True))

    attribution = AttributionModule(module, config.trajectory, instantiate(config.estimator))
    scores = attribution.attribute(train=train, query=query)
    indices, values = scores.opponents(query=0, k=3)
    print(
        f"{type(attribution.estimator).__name__}: harmed most by examples "
        + ", ".join(f"{n} ({value:.2g})" for n, value in zip(indices, values, strict=True))
    )


if __name__ == "__main__":
    main()
