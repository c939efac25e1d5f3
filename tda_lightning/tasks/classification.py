"""Classification, of examples or of positions within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.tasks import batches
from tda_lightning.tasks.base import AttributionTask
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.gauss_newton import sampled_gauss_newton_loss
from tda_lightning.tasks.standard_losses import check_labels, describe_classes


@dataclass
class ClassificationTask(AttributionTask):
    r"""Cross entropy of a module that maps inputs to logits [batch, classes, ...].

    With further axes (segmentation) an example's loss is the mean over its positions. With class
    weights,

    .. math::
        l_n = w_{y_n} CE_n / \bar w

    where ``nn.CrossEntropyLoss(weight)`` divides by the batch's own sum of weights. That sum
    varies with the company an example happens to be in; its expectation is B :math:`\bar w`, so
    give :math:`\bar w` as ``average_weight``: the mean of the class weights over the training
    examples, 1 for "balanced" weights.

    Args:
        class_weights: one for each class.
        average_weight: mean of the class weights over the training examples.
        label_smoothing: as in ``nn.CrossEntropyLoss``.
        ignore_index: label of positions that do not count.
        measure: ``"loss"``, or ``"margin"``: minus the log-odds of the correct class, which does
            not flatten out as the loss does when the model is sure.
        target: key of the labels in dictionary batches.
        layers: names of modules (or prefixes) to restrict to.
    """

    class_weights: Sequence[float] | None = None
    average_weight: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    measure: Literal["loss", "margin"] = "loss"
    target: str | None = None
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.measure not in ("loss", "margin"):
            raise ValueError(f"measure must be 'loss' or 'margin', got {self.measure!r}.")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in 0 .. 1, got {self.label_smoothing}.")
        if not self.average_weight > 0:
            raise ValueError(f"average_weight must be positive, got {self.average_weight}.")

    def forward(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [batch, classes, ...] and labels [batch, ...], or class probabilities."""
        inputs, target = batches.split_target(batch, self.target)
        return batches.call(module, inputs), target

    def train_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        logits, target = self._checked(module, batch)
        weight = None
        if self.class_weights is not None:
            weight = torch.tensor(list(self.class_weights), dtype=logits.dtype)
            weight = weight.to(logits.device)
        losses = F.cross_entropy(
            logits,
            target,
            weight=weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        return self._position_mean(losses, target) / self.average_weight

    @property
    def measures_loss(self) -> bool:
        return self.measure == "loss" and type(self).measurement is ClassificationTask.measurement

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        if self.measure == "loss":
            return self.train_loss(module, batch)
        logits, target = self._checked(module, batch)
        if target.is_floating_point():
            raise ValueError("measure='margin' expects class indices, got class probabilities.")
        labels = target.where(target != self.ignore_index, 0).unsqueeze(1)
        correct = logits.gather(1, labels)
        classes = torch.arange(logits.shape[1], device=logits.device)
        classes = classes.view(1, -1, *[1] * (logits.dim() - 2))
        others = logits.masked_fill(classes == labels, -torch.inf).logsumexp(1)
        return self._position_mean(
            (others - correct.squeeze(1)) * (target != self.ignore_index), target
        )

    def sampled_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return sampled_gauss_newton_loss(self, module, batch)

    def prediction(self, module: nn.Module, batch: Batch) -> list[str] | None:
        logits, _ = self.forward(module, batch)
        return describe_classes(logits) if logits.dim() == 2 else None

    def _position_mean(self, losses: Tensor, target: Tensor) -> Tensor:
        """Mean over the positions of each example that count, [batch]."""
        if target.is_floating_point():
            return losses.flatten(1).mean(1) if losses.dim() > 1 else losses
        counted = (target != self.ignore_index).reshape(len(target), -1).sum(1)
        return losses.reshape(len(losses), -1).sum(1) / counted.clamp_min(1)

    def _checked(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, target = self.forward(module, batch)
        if logits.dim() < 2 or logits.shape[1] < 2:
            raise ValueError(
                "ClassificationTask expects logits [batch, classes, ...] of at least 2 classes, "
                f"got outputs of shape {list(logits.shape)}. For a single logit trained with "
                "binary_cross_entropy_with_logits use task=None or your own AttributionTask."
            )
        classes = logits.shape[1]
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ValueError(
                f"Expected {classes} class_weights, one for each output, got "
                f"{len(self.class_weights)}."
            )
        soft = target.is_floating_point()
        wanted = logits.shape if soft else logits.shape[:1] + logits.shape[2:]
        if target.shape != wanted:
            raise ValueError(
                f"Expected labels of shape {list(wanted)} for logits of shape "
                f"{list(logits.shape)}, got {list(target.shape)} ({target.dtype}). Reshape the "
                "labels in the data set or override forward(module, batch)."
            )
        if soft:
            return logits, target
        check_labels(target, classes, self.ignore_index)
        return logits, target.long()
