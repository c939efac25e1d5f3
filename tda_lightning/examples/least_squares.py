r"""Least squares in two weights: small enough to check every score by hand.

Example n has the loss :math:`l_n = (w \cdot x_n - y_n)^2 / 2`. Two examples have the input
(2, 0) and the targets 3 and 1, two have (0, 1) and again 3 and 1. The best weights are (1, 2), and
there

- the gradients are (-2, 0), (2, 0), (0, -1) and (0, 1),
- the curvature of the mean loss is diag(2, 1/2),
- the query, whose input is (1, 1) and whose target is 0, has the gradient (3, 3).

Gradient descent that starts at the best weights stays there. So an estimator's score of example n
is :math:`3 g_n f(\sigma_n) / 4`, with f its own function of the eigenvalue 2 or 1/2.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.recording import TrajectoryRecorder


class LeastSquares(LightningModule):
    """A linear layer without bias that starts at the best weights, (1, 2)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.layer = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.layer.weight).data += torch.tensor([[1.0, 2.0]])

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Half the mean squared error."""
        inputs, targets = batch
        return nn.functional.mse_loss(self.layer(inputs), targets) / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def least_squares_scores(
    estimator: Any, steps: int = 10, rate: float = 0.1, stages: int = 1
) -> Tensor:
    """Scores of the four examples for the query, [train], after full-batch gradient descent; of
    those of each stage, where training goes on for several."""
    inputs = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    targets = torch.tensor([[3.0], [1.0], [3.0], [1.0]])
    train = TensorDataset(inputs.double(), targets.double())
    query = TensorDataset(torch.ones(1, 2).double(), torch.zeros(1, 1).double())
    module = LeastSquares(rate)
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    with TemporaryDirectory() as folder:
        runs = [f"{folder}/{number}" for number in range(stages)]
        for run in runs:
            trainer = Trainer(
                max_epochs=steps, callbacks=[TrajectoryRecorder(run, num_checkpoints=3)], **quiet
            )
            trainer.fit(module, DataLoader(train, batch_size=4))
        several = stages > 1
        attribution = AttributionModule(module, runs if several else runs[0], estimator)
        scores = attribution.attribute(
            [train] * stages if several else train,
            query,
            trainer=Trainer(inference_mode=False, **quiet),
            self_influence=False,
        )
        return scores.values[0].float()
