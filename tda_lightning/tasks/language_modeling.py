"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.tasks import batches
from tda_lightning.tasks.base import AttributionTask
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.gauss_newton import sampled_gauss_newton_loss
from tda_lightning.tasks.standard_losses import check_labels

REDUCTIONS = ("mean", "sum", "batch")


@dataclass
class LanguageModelingTask(AttributionTask):
    """Cross entropy over tokens of a module that maps tokens to logits [batch, time, vocabulary].

    Batches are tokens [batch, time], each predicting the next; a pair (inputs, targets) of one
    shape; or a dictionary with ``input_ids``, and optionally ``labels`` and ``attention_mask``,
    where logits predict the next position's label (the convention of Hugging Face). Without
    ``labels`` the tokens under the attention mask are the labels.

    Args:
        reduction: how training reduced over tokens. ``"mean"``: over an example's own tokens;
            ``"sum"``: summed within an example, averaged over examples; ``"batch"``: over all
            tokens of the batch, as ``F.cross_entropy(logits.view(-1, V), targets.view(-1))``.
        tokens_per_example: for ``"batch"``, the average number of tokens that count, which makes
            the loss of an example independent of its batch. By default the average in the batch
            at hand, and from ``prepare`` on that of its batch.
        ignore_index: label of the tokens that do not count (padding).
        shift: whether logits at one position predict the label of the next. By default only for
            dictionaries.
        target: key of the labels in dictionary batches.
        layers: names of modules (or prefixes) to restrict to.
    """

    reduction: Literal["mean", "sum", "batch"] = "mean"
    tokens_per_example: float | None = None
    ignore_index: int = -100
    shift: bool | None = None
    target: str = "labels"
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {self.reduction!r}.")
        self._prepared_tokens: float | None = None

    def prepare(self, module: nn.Module, batch: Batch) -> None:
        super().prepare(module, batch)
        if self.reduction == "batch" and self.tokens_per_example is None:
            _, targets = self.forward(module, batch)
            counted = (targets != self.ignore_index).sum()
            self._prepared_tokens = float(counted) / len(targets)
            if counted != targets.numel():
                self.notes.append(
                    "The number of tokens that a batch mean divides by is held at the first "
                    f"batch's {self._prepared_tokens:.6g} per example."
                )

    def forward(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [batch, time, vocabulary] and the label of each, [batch, time]."""
        if isinstance(batch, Tensor) or (isinstance(batch, (tuple, list)) and len(batch) == 1):
            tokens = batch if isinstance(batch, Tensor) else batch[0]
            return batches.call(module, [tokens[:, :-1]]), tokens[:, 1:]
        shift = self.shift
        if isinstance(batch, Mapping):
            shift = True if shift is None else shift
            batch = self._with_labels(batch)
        inputs, labels = batches.split_target(batch, self.target)
        logits = batches.call(module, inputs)
        return (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)

    def train_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        losses, counted = self._token_losses(module, batch)
        if self.reduction == "sum":
            return losses.sum(1)
        if self.reduction == "mean":
            return losses.sum(1) / counted.clamp_min(1)
        tokens = self.tokens_per_example or self._prepared_tokens
        return losses.sum(1) / (tokens or counted.sum().clamp_min(1) / len(counted))

    def batch_loss(
        self, module: nn.Module, batch: Batch, by_position: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.reduction != "batch":
            return super().batch_loss(module, batch, by_position)
        losses, counted = self._token_losses(module, batch)
        # The number of tokens is this batch's own, not held as for single examples.
        parts = losses / counted.sum().clamp_min(1)
        return parts.sum(), parts if by_position else parts.sum(1)

    def sampled_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return sampled_gauss_newton_loss(self, module, batch)

    def prediction(self, module: nn.Module, batch: Batch) -> list[str] | None:
        losses, counted = self._token_losses(module, batch)
        means = losses.sum(1) / counted.clamp_min(1)
        return [f"perplexity {value:.4g}" for value in means.detach().exp().tolist()]

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "prepared_tokens": self._prepared_tokens}

    def _token_losses(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropy [batch, time], 0 where ignored, and the number of tokens [batch]."""
        logits, targets = self.forward(module, batch)
        if logits.dim() == 2 and len(logits) == targets.numel():
            logits = logits.view(*targets.shape, -1)
        if targets.dim() != 2 or logits.shape[:-1] != targets.shape:
            raise ValueError(
                "LanguageModelingTask expects logits [batch, time, vocabulary] and targets "
                f"[batch, time], got {list(logits.shape)} and {list(targets.shape)}. Set shift "
                "when the logits of one position predict the next, or override "
                "forward(module, batch)."
            )
        vocabulary = logits.shape[-1]
        check_labels(targets, vocabulary, self.ignore_index)
        losses = F.cross_entropy(
            logits.reshape(-1, vocabulary),
            targets.reshape(-1).long(),
            ignore_index=self.ignore_index,
            reduction="none",
        )
        return losses.view(targets.shape), (targets != self.ignore_index).sum(1)

    def _with_labels(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.target in batch:
            return batch
        if "input_ids" not in batch:
            raise ValueError(
                f"Expected a dictionary with 'input_ids' or {self.target!r}, got the keys "
                f"{list(batch)}. Name the key of the labels with target=."
            )
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.where(batch["attention_mask"] != 0, self.ignore_index)
        return {**batch, self.target: labels}
