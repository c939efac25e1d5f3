"""Does exact unrolling foretell what another label does? The change of the mean test loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from experiments.descent import descend
from experiments.mislabelled.ranking import quiet
from experiments.mislabelled.setting import final, network
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.edits import Relabel
from tda_lightning.estimators import Unrolled
from tda_lightning.examples.data import FashionMNISTData
from tda_lightning.tasks import ClassificationTask

EDITED = 40  # most suspicious labels, each changed alone
ACTIVATIONS = ("relu", "gelu")
NUDGE = 1e-5  # of a tensor's spread


class MeanOverSet(ClassificationTask):
    """A query is a whole set of pictures [set, ...], measured by the mean of their losses."""

    def measurement(self, module: nn.Module, batch: Any) -> Tensor:
        inputs, labels = batch
        found = self.train_loss(module, (inputs.flatten(0, 1), labels.flatten()))
        return found.view(labels.shape).mean(1)

    def prediction(self, module: nn.Module, batch: Any) -> None:
        """A set has none of its own."""


@dataclass(frozen=True)
class Edits:
    """New labels of some training examples.

    Attributes:
        examples: [edit].
        labels: the class that the model finds likeliest of the others than the given one, [edit].
    """

    examples: Tensor
    labels: Tensor


def proposed(run: Trajectory, data: FashionMNISTData, suspicion: Tensor) -> Edits:
    """For the most suspicious labels."""
    examples = suspicion.argsort(descending=True)[:EDITED]
    inputs, labels = data.train_dataset[examples]
    with torch.no_grad():
        logits = final(run)(inputs)
    return Edits(examples, logits.scatter(1, labels[:, None], -torch.inf).argmax(1))


def predicted(run: Trajectory, data: FashionMNISTData, edits: Edits, activation: str) -> Tensor:
    """Change of the mean test loss under each edit, by one exact unrolling, [edit]."""
    relabelled = [
        Relabel(index, label)
        for index, label in zip(edits.examples.tolist(), edits.labels.tolist(), strict=True)
    ]
    queries = TensorDataset(*(tensor[None] for tensor in data.query_dataset.tensors))
    module = AttributionModule(network(activation), run, Unrolled(), MeanOverSet())
    scores = module.attribute(
        data.train_dataset, queries, trainer=quiet(), self_influence=False, edits=relabelled
    )
    return scores.values[0]


def measured(
    run: Trajectory, data: FashionMNISTData, edits: Edits, activation: str
) -> Iterator[float]:
    """The mean test loss of the recorded run repeated as it was, and then under each edit."""
    yield loss_after(run, data, data.train_dataset.tensors[1], activation)
    for example, label in zip(edits.examples, edits.labels, strict=True):
        changed = data.train_dataset.tensors[1].clone()
        changed[example] = label
        yield loss_after(run, data, changed, activation)


def nudged(run: Trajectory, data: FashionMNISTData, activation: str) -> float:
    """The mean test loss of the recorded run repeated from initial weights that are moved by next
    to nothing: a change from the recorded one is what a rough run makes of nothing."""
    return loss_after(run, data, data.train_dataset.tensors[1], activation, NUDGE)


def loss_after(
    run: Trajectory, data: FashionMNISTData, labels: Tensor, activation: str, nudge: float = 0.0
) -> float:
    """After the recorded batches with these labels."""
    module, noise = network(activation), torch.Generator().manual_seed(0)
    module.load_state_dict(dict(run.checkpoints[0].parameters))
    with torch.no_grad():
        for parameter in module.parameters():
            step = torch.randn(parameter.shape, generator=noise) * parameter.std()
            parameter += nudge * step
    batches = [run.steps.batches(row)[0] for row in range(run.num_steps)]
    descend(module, TensorDataset(data.train_dataset.tensors[0], labels), batches)
    inputs, right = data.query_dataset.tensors
    with torch.no_grad():
        return float(F.cross_entropy(module(inputs).double(), right))
