"""Which labels to look at first: every way of ranking, one number for each training picture."""

from __future__ import annotations

from dataclasses import replace

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import TensorDataset

from experiments.mislabelled.setting import network
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tda_lightning.evaluation.retraining import losses
from tda_lightning.examples.data import FashionMNISTData
from tda_lightning.tasks import ClassificationTask

TASK = ClassificationTask()
TITLES = {
    "source": "SOURCE",
    "influence": "influence function",
    "tracin": "TracIn",
    "self_loss": "own loss",
    "random": "random",
}


def suspicion(name: str, run: Trajectory, data: FashionMNISTData, seed: int) -> Tensor:
    """Most suspicious where largest, [train]: self-influence, the own loss, or chance."""
    if name == "random":
        return torch.rand(len(data.clean_labels), generator=torch.Generator().manual_seed(seed))
    if name == "self_loss":
        end = run.checkpoints[run.last_step].parameters
        return losses(network(), TASK, end, data.train_dataset)
    estimator = {"source": Source, "influence": InfluenceFunction, "tracin": TracIn}[name]()
    asked = TensorDataset(*(tensor[:1] for tensor in data.query_dataset.tensors))
    fresh = replace(run, curvature={})  # each fits its own
    module = AttributionModule(network(), fresh, estimator, TASK)
    scores = module.attribute(data.train_dataset, asked, trainer=quiet(), self_influence=True)
    assert scores.self_influence is not None
    return scores.self_influence


def quiet() -> Trainer:
    """Runs the passes and shows nothing."""
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
