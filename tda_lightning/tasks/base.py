"""What attribution asks of a training problem: its loss, one number per example."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from tda_lightning.runtime.digests import source_digest
from tda_lightning.tasks import batches
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.loss_calls import WeightedLoss, intercept, standard_outputs


class AttributionTask(ABC):
    """The training loss and the measurement of single examples.

    A subclass gives :meth:`train_loss`; the rest has defaults. Losses are those of the loss *as
    optimised*: the loss of a training batch is the mean of ``train_loss`` over its examples. A sum
    in place of a mean over tokens would multiply the curvature by the number of tokens.

    Attributes:
        layers: names of modules (or their prefixes) whose parameters count; None for all.
        separable: False when the losses of single examples are not known and ``train_loss``
            repeats the mean loss of the batch.
        training_batch_size: examples per batch in training, where that is known; set before
            :meth:`prepare`. A loss that *sums* over its batch needs it.
        draws: over how many draws of its own noise a loss that draws random numbers (a VAE, a
            diffusion model, mixup) is averaged.

    Example:
        >>> class Logistic(AttributionTask):
        ...     def train_loss(self, module, batch):
        ...         inputs, target = batch
        ...         logits = module(inputs).squeeze(1)
        ...         return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        ...
        ...     def sampled_loss(self, module, batch):  # optional: the true Fisher
        ...         return sampled_gauss_newton_loss(self, module, batch)
    """

    layers: Sequence[str] | None = None
    separable: bool = True
    training_batch_size: int | None = None
    draws: int = 1

    @abstractmethod
    def train_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Loss of each example as trained, [batch]."""

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        """What is explained for each query, [batch]; smaller when the model does better."""
        return self.train_loss(module, batch)

    def share(self, size: int) -> float:
        """Weight of one example's ``train_loss`` in the loss of a training batch of ``size``."""
        return 1 / size

    def batch_loss(
        self, module: nn.Module, batch: Batch, by_position: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The loss of a training batch as optimised, and what each example contributes to it.

        Args:
            by_position: contributions of each example's single terms (the tokens of a sequence)
                in place of their sums.

        Returns:
            A scalar, and [batch] or [batch, position]. With example n's loss weighted by w_n the
            scalar changes by contribution n times (w_n - 1); a part that belongs to no example (a
            regulariser) is in the scalar only.
        """
        if by_position:
            parts = intercept(lambda: self.train_loss(module, batch))
            share = self.share(parts.batch)
            return parts.total.sum() * share, parts.by_position() * share
        losses = self.train_loss(module, batch)
        return losses.sum() * self.share(len(losses)), losses * self.share(len(losses))

    def relabelled(self, batch: Batch, labels: Mapping[int, object]) -> Batch:
        """The batch with other labels at some of its positions.

        Raises:
            ValueError: the batch is none of (inputs, target) or a dictionary with a target, or a
                label has another shape than those of the batch.
        """
        return batches.with_labels(batch, labels, getattr(self, "target", None))

    def example(self, batch: Batch, index: int) -> Batch:
        """The example at ``index`` of a batch, as a batch of one.

        By default a slice, where slices are what the loader's own ``collate_fn`` makes of single
        examples (padding, packing and tensors that belong to no example included), and otherwise
        the example read again. Override it for batches that neither can be done with.
        """
        return batches.cut_or_read(batch, index)

    @property
    def measures_loss(self) -> bool:
        """Whether the measurement is the training loss, so that one pass serves both."""
        return type(self).measurement is AttributionTask.measurement

    def sampled_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """A loss of labels drawn from the model, or of other noise with their covariance, [batch]:
        the second moment of its gradient is the Gauss-Newton matrix of ``train_loss``."""
        raise NotImplementedError(
            f"{type(self).__name__} has no sampled_loss, so curvature is the empirical Fisher. If "
            "its train_loss calls standard losses of torch.nn.functional, define sampled_loss as "
            "tda_lightning.tasks.sampled_gauss_newton_loss(self, module, batch)."
        )

    @property
    def can_sample(self) -> bool:
        """Whether :meth:`sampled_loss` may be called."""
        return type(self).sampled_loss is not AttributionTask.sampled_loss

    def prepare(self, module: nn.Module, batch: Batch) -> None:
        """Look at one training batch before the work starts; earlier notes are forgotten."""
        self.notes.clear()

    @property
    def notes(self) -> list[str]:
        """What a reader of the scores should know about these losses."""
        notes: list[str] = self.__dict__.setdefault("_notes", [])
        return notes

    def prediction(self, module: nn.Module, batch: Batch) -> list[str] | None:
        """What the model predicts for each example, in a few words; None if nothing short."""
        return None

    def settings(self) -> dict[str, object]:
        """What determines the task, able to become JSON: part of the key of cached curvature."""
        kind = type(self)
        names = [item.name for item in fields(self)] if is_dataclass(self) else list(vars(self))
        public = {name: getattr(self, name) for name in names if not name.startswith("_")}
        settings = {"class": f"{kind.__module__}.{kind.__qualname__}", "layers": self.layers}
        settings.update(public)
        if not kind.__module__.startswith("tda_lightning."):
            settings["source"] = source_digest(kind)
        plain: dict[str, object] = json.loads(json.dumps(settings, default=_plain))
        return plain

    def standard_losses(self, module: nn.Module, batch: Batch) -> tuple[list[WeightedLoss], int]:
        """The standard losses in ``train_loss`` with their weights, and the number of examples."""
        parts = intercept(lambda: self.train_loss(module, batch))
        return parts.losses, parts.batch

    def standard_outputs(self, module: nn.Module, batch: Batch) -> list[Tensor]:
        """What those losses are of, by call: in a forward-mode derivative all that is needed."""
        return standard_outputs(lambda: self.train_loss(module, batch))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    try:
        return list(value)
    except TypeError:
        return repr(value)
