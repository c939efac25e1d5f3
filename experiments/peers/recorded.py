"""A recorded run as the other libraries need it: data, module, weights, and the loss they are told.

A library is told a loss as its own documentation writes it: cross entropy of an example, squared
error summed over an example's outputs, cross entropy summed over an example's tokens. That is
``scale`` times the loss as trained, and each script takes the factor out of the scores again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from tda_lightning import Trajectory
from tda_lightning.attribution.matching import require_same_data, require_same_parameters
from tda_lightning.cli.run_config import build, load_config
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import (
    AttributionTask,
    ClassificationTask,
    LanguageModelingTask,
    RegressionTask,
)


def class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy [batch] of logits [batch, class]."""
    return F.cross_entropy(logits, labels, reduction="none")


def drawn_classes(logits: Tensor) -> Tensor:
    """Labels [batch] drawn from the model."""
    return torch.multinomial(logits.softmax(1), 1).flatten()


def squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error [batch], summed over the outputs of an example."""
    return (outputs - targets).square().flatten(1).sum(1)


def drawn_numbers(outputs: Tensor) -> Tensor:
    """Targets whose negative log likelihood is the squared error: normal, of variance 1/2."""
    return torch.normal(outputs, math.sqrt(0.5))


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy [batch], summed over tokens, of logits [batch, position, token]."""
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").sum(1)


def drawn_tokens(logits: Tensor) -> Tensor:
    """Tokens [batch, position] drawn from the model, each given the true ones before it."""
    return torch.multinomial(logits.flatten(0, 1).softmax(1), 1).view(logits.shape[:2])


Losses = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[type[AttributionTask], tuple[Losses, Callable[[Tensor], Tensor]]] = {
    ClassificationTask: (class_losses, drawn_classes),
    RegressionTask: (squared_errors, drawn_numbers),
    LanguageModelingTask: (token_losses, drawn_tokens),
}


@dataclass(frozen=True)
class Run:
    """A recorded run.

    Attributes:
        folder: of the trajectory.
        changes: settings of the data that replaced recorded ones.
        module: in eval mode, on the device, with the last checkpoint's weights.
        task: as recorded.
        losses: what a library is told, of outputs and targets: [batch].
        draw: targets drawn from the model, given outputs.
        scale: ``losses`` over the loss as trained, the same for every example.
    """

    folder: Path
    trajectory: Trajectory
    changes: dict[str, str]
    train: Dataset
    query: Dataset
    module: LightningModule
    task: AttributionTask
    losses: Losses
    draw: Callable[[Tensor], Tensor]
    scale: float
    device: torch.device

    @property
    def num_train(self) -> int:
        return len(self.train)  # type: ignore[arg-type]

    @property
    def num_query(self) -> int:
        return len(self.query)  # type: ignore[arg-type]

    @property
    def steps(self) -> list[int]:
        """Steps of the recorded checkpoints, the initial weights left out."""
        return sorted(step for step in self.trajectory.checkpoints if step > 0)

    def load(self, step: int) -> None:
        """Give the module the weights and buffers recorded after ``step``."""
        _load(self.module, self.trajectory, step)

    def batches(self, dataset: Dataset, batch_size: int) -> DataLoader:
        """Batches in order, on the module's device."""
        return _batches(dataset, batch_size, self.device)


def open_run(folder: Path, data_root: str | None, device: str) -> Run:
    """The run that ``tda train`` recorded in ``folder``.

    Args:
        data_root: where the data files are now; None: where they were.
        device: to compute on.

    Raises:
        ValueError: its task is none of the three, or its loss cannot be told to the libraries.
        UnsupportedTrainingError: parameters were frozen, or there were several stages.
    """
    trajectory, config = Trajectory.load(str(folder)), load_config(folder)
    # The digits come with scikit-learn and have no folder.
    changes = {"root": data_root} if data_root is not None and "root" in config.data else {}
    data = build(config.data, False, **changes)
    module = build(config.model, False, optimizer=None, scheduler=None)
    task = build(config.get("task"), False)
    require_same_parameters(module, trajectory)
    require_same_data(trajectory, ExampleSource.of(data.train_dataset, 1, "training"))
    frozen = set(dict(module.named_parameters())) - set(trajectory.facts.parameters)
    if frozen or len(trajectory.facts.stages) > 1:
        raise UnsupportedTrainingError(
            "The other libraries are compared on runs that train all parameters in one stage; "
            f"{folder} has {len(trajectory.facts.stages)} stages and {len(frozen)} frozen "
            "parameters."
        )
    place = torch.device(device)
    module.to(place).eval()
    _load(module, trajectory, trajectory.last_step)
    losses, draw = _told(task)
    first = next(iter(_batches(data.train_dataset, min(64, len(data.train_dataset)), place)))
    scale = _scale(module, task, losses, first)
    return Run(
        folder,
        trajectory,
        changes,
        data.train_dataset,
        data.query_dataset,
        module,
        task,
        losses,
        draw,
        scale,
        place,
    )


def _load(module: LightningModule, trajectory: Trajectory, step: int) -> None:
    checkpoint = trajectory.checkpoints[step]
    module.load_state_dict({**checkpoint.parameters, **checkpoint.buffers})


def _batches(dataset: Dataset, batch_size: int, device: torch.device) -> DataLoader:
    def collate(examples: list[Any]) -> list[Tensor]:
        return [part.to(device) for part in default_collate(examples)]

    return DataLoader(dataset, batch_size, collate_fn=collate)


def _told(task: AttributionTask | None) -> tuple[Losses, Callable[[Tensor], Tensor]]:
    for kind, found in LOSSES.items():
        if isinstance(task, kind) and task.measures_loss and task.layers is None:
            return found
    raise ValueError(
        "Expected a run of task=classification, regression or language_modeling that measures its "
        f"loss over all layers, got {'task=none' if task is None else task}. The libraries are "
        "told the loss in a form of their own, so it has to be one of these."
    )


def _scale(
    module: LightningModule, task: AttributionTask, losses: Losses, batch: list[Tensor]
) -> float:
    """How many times the loss as trained a library is told."""
    with torch.no_grad():
        task.prepare(module, batch)
        trained = task.train_loss(module, batch)
        told = losses(module(*batch[:-1]), batch[-1])
    scale = float(told.double().sum() / trained.double().sum())
    if not torch.allclose(told, scale * trained, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"The loss of {type(task).__name__} with its recorded settings is not a multiple of "
            f"{losses.__name__}, which the libraries are told: class weights, label smoothing, "
            "ignored tokens and sequences of different lengths are not possible here."
        )
    return scale
