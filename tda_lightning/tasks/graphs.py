"""Classification and regression of whole graphs, in batches as torch_geometric makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tda_lightning.runtime.graphs import Key, entry
from tda_lightning.tasks.base import AttributionTask
from tda_lightning.tasks.batches import Batch, unwrap
from tda_lightning.tasks.gauss_newton import sampled_gauss_newton_loss
from tda_lightning.tasks.nodes import LOSSES, standard_loss


@dataclass
class GraphTask(AttributionTask):
    """Examples are graphs: the training loss is the mean over the graphs of a batch.

    A ``training_step`` with a plain mean over its graphs needs no task (``task=None``).

    Attributes:
        target: key of the labels, [graphs].
        inputs: keys of what the module is called with; None: the batch itself.
        loss: ``cross_entropy``, ``mse`` (mean over outputs) or ``bce``.

    Raises:
        ValueError: another loss; when scoring, a module that gives no output for each graph.
    """

    target: Key = "y"
    inputs: Sequence[Key] | None = None
    loss: str = "cross_entropy"
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}.")

    def outputs_of_graphs(self, module: nn.Module, batch: Batch) -> Tensor:
        """What the module says of every graph, [graphs, ...]. Override it for other calls."""
        if self.inputs is None:
            return unwrap(module(batch))
        return unwrap(module(*(entry(batch, key, "an input") for key in self.inputs)))

    def train_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        outputs = self.outputs_of_graphs(module, batch)
        targets = entry(batch, self.target, "labels")
        if not isinstance(targets, Tensor) or len(targets) != len(outputs):
            raise ValueError(
                f"Expected one output of the module for each of the {len(targets)} graphs, got "
                f"{list(outputs.shape)}. For losses of single nodes use NodeTask."
            )
        return standard_loss(self.loss, outputs, targets)

    def sampled_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return sampled_gauss_newton_loss(self, module, batch)

    def prediction(self, module: nn.Module, batch: Batch) -> list[str] | None:
        if self.loss != "cross_entropy":
            return None
        with torch.no_grad():
            chances, classes = self.outputs_of_graphs(module, batch).softmax(1).max(1)
        pairs = zip(classes.tolist(), chances.tolist(), strict=True)
        return [f"{label} ({chance:.0%})" for label, chance in pairs]
