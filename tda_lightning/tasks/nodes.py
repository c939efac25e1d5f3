"""Classification and regression of the nodes of one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.runtime.graphs import EDGE_INDEX, Key, entry, matrix_key
from tda_lightning.tasks.base import AttributionTask
from tda_lightning.tasks.batches import required_arguments, unwrap
from tda_lightning.tasks.gauss_newton import sampled_gauss_newton_loss
from tda_lightning.tasks.node_batch import NodeBatch

LOSSES = ("cross_entropy", "mse", "bce")


def standard_loss(loss: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The losses [batch] of outputs [batch, ...], by the name of one of ``LOSSES``."""
    if loss == "cross_entropy":
        return F.cross_entropy(outputs, targets, reduction="none")
    targets = targets.to(outputs).reshape(outputs.shape)
    if loss == "mse":
        losses = F.mse_loss(outputs, targets, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    return losses.reshape(len(losses), -1).mean(1)


@dataclass
class NodeTask(AttributionTask):
    r"""Examples are the training nodes of one graph, queries are nodes.

    The training loss is the mean over the training nodes,

    .. math::
        L = \frac1N \sum_{n \in \text{mask}} \ell(f(G)_n, y_n)

    A ``training_step`` on the whole graph that chooses its nodes by a mask needs no task: with
    ``task=None`` there is a column for each training node. This one is for losses that are written
    otherwise, and for the command line.

    Attributes:
        train_mask: key of the mask (or of the ids) of the training nodes in the graph.
        query_mask: that of the queries, where they are given as a graph; None: they are given as
            :class:`~tda_lightning.tasks.Nodes`.
        target: key of the labels.
        inputs: keys of what the module is called with; None: the graph itself, or where the
            module takes more than one argument the graph's ``x`` and its edges.
        loss: ``cross_entropy``, ``mse`` (mean over outputs) or ``bce``.

    Raises:
        ValueError: another loss; when scoring, a key that the graph has not got.
    """

    train_mask: Key = "train_mask"
    query_mask: Key | None = None
    target: Key = "y"
    inputs: Sequence[Key] | None = None
    loss: str = "cross_entropy"
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}.")

    def outputs_of_nodes(self, module: nn.Module, graph: object) -> Tensor:
        """What the module says of every node, [nodes, ...]. Override it for other calls."""
        keys = self.inputs
        if keys is None and required_arguments(module) > 1:
            edges = matrix_key(graph)
            keys = ["x", EDGE_INDEX if edges is None else edges]
        if keys is None:
            return unwrap(module(graph))
        return unwrap(module(*(entry(graph, key, "an input") for key in keys)))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Losses of some nodes, [batch], of their outputs [batch, ...]. Override for others."""
        return standard_loss(self.loss, outputs, targets)

    def train_loss(self, module: nn.Module, batch: NodeBatch) -> Tensor:
        outputs = self.outputs_of_nodes(module, batch.graph)
        targets = entry(batch.graph, self.target, "labels")
        if not isinstance(targets, Tensor) or len(targets) != len(outputs):
            raise ValueError(
                f"Expected one output of the module for each of the {len(targets)} labels, got "
                f"{list(outputs.shape)}."
            )
        return self.losses(outputs[batch.nodes], targets[batch.nodes])

    def sampled_loss(self, module: nn.Module, batch: NodeBatch) -> Tensor:
        return sampled_gauss_newton_loss(self, module, batch)

    def prediction(self, module: nn.Module, batch: NodeBatch) -> list[str] | None:
        if self.loss != "cross_entropy":
            return None
        with torch.no_grad():
            outputs = self.outputs_of_nodes(module, batch.graph)[batch.nodes]
        chances, classes = outputs.softmax(1).max(1)
        pairs = zip(classes.tolist(), chances.tolist(), strict=True)
        return [f"{label} ({chance:.0%})" for label, chance in pairs]
