"""``task=None``: the module's own ``training_step`` is the training loss and the measurement."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tda_lightning.runtime.digests import source_digest
from tda_lightning.runtime.silence import silenced
from tda_lightning.runtime.stand_in import stand_in_of
from tda_lightning.tasks import batches
from tda_lightning.tasks.base import AttributionTask
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.example_seeds import active_examples, seeded_examples
from tda_lightning.tasks.gauss_newton import sampled_gauss_newton_loss
from tda_lightning.tasks.loss_calls import LossParts, WeightedLoss, intercept, standard_outputs
from tda_lightning.tasks.step_noise import restart_noise, watching_noise


class TrainingStepTask(AttributionTask):
    r"""Losses of single examples from an unchanged ``training_step``.

    Its calls of standard losses are intercepted; the weight of each element in the batch's loss is
    a derivative, so factors, masks and reductions are those of training:

    .. math::
        l_n = B \sum_t w_{nt} e_{nt}, \qquad w_{nt} = \partial L_{batch} / \partial e_{nt}

    What does not depend on a standard loss (a regulariser) belongs to no example and is left out,
    with a note. Without any standard loss, every example gets the mean loss of its batch
    (``separable`` is False) and curvature is the empirical Fisher.

    A weighted mean (class weights, ignored targets) divides by a number that differs between
    batches. :meth:`prepare` fixes it at its batch's average for an example, so that an example's
    loss does not depend on the batch it comes in; before that, it is each batch's own.

    :meth:`prepare` also recognises a step that *sums* over its batch: its gradient is that of a
    mean over ``training_batch_size`` examples of as many times the loss, and the measurement of a
    query is the loss itself.
    """

    def __init__(self, layers: Sequence[str] | None = None) -> None:
        self.layers = layers
        self._reset()

    def _reset(self) -> None:
        self.separable = True
        self._can_sample = True
        self._summed = False
        self._masses: list[Tensor | None] = []
        self._training_step: list[str | None] = []

    @property
    def can_sample(self) -> bool:
        return self._can_sample

    def prepare(self, module: nn.Module, batch: Batch) -> None:
        """Learn from one batch which losses ``training_step`` calls."""
        super().prepare(module, batch)
        self._reset()
        kind = type(module)
        self._training_step = [f"{kind.__module__}.{kind.__qualname__}", source_digest(kind)]
        parts = self._parts(module, batch)
        self.separable = parts.by_example
        if not self.separable:
            self._can_sample = False
            reason = "it calls no standard loss"
            if parts.losses:
                shapes = [list(item.loss.values.shape) for item in parts.losses]
                reason = f"its losses have shapes {shapes} for {parts.batch} examples"
            self._note(
                f"The losses of single examples in training_step are not known ({reason}): each "
                "example gets the gradient of its batch's mean loss, and curvature is the "
                "empirical Fisher. Give a task to attribute to single examples."
            )
            return
        self._fix_masses(parts)
        self._check_weights(parts)
        self._check_alone(module, batch, parts.batch)

    def train_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        parts = self._parts(module, batch)
        if self._training_step and self.separable and not parts.by_example:
            raise ValueError(
                f"training_step called no standard loss of {parts.batch} examples for this batch, "
                "but did for the first one. Give a task whose train_loss holds for every batch."
            )
        if parts.by_example and self.separable:
            losses = parts.per_example() * self._examples_per_mean(parts.batch)
        else:
            losses = parts.total.reshape(()).expand(parts.batch)
        return losses if torch.is_grad_enabled() else losses.detach()

    def batch_loss(
        self, module: nn.Module, batch: Batch, by_position: bool = False
    ) -> tuple[Tensor, Tensor]:
        # What a mean divides by is this batch's own, not held as for single examples.
        parts = self._parts(module, batch, masses=())
        if not parts.by_example:
            raise ValueError(
                "The losses of single examples in training_step are not known: it calls no "
                f"standard loss of {parts.batch} examples. Give a task."
            )
        losses = parts.by_position() if by_position else parts.per_example()
        return parts.total.reshape(()), losses

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        losses = self.train_loss(module, batch)
        return losses / self._examples_per_mean(1) if self._summed else losses

    def share(self, size: int) -> float:
        return 1 / self._examples_per_mean(size)

    @property
    def measures_loss(self) -> bool:
        return not self._summed

    def _examples_per_mean(self, size: int) -> int:
        """What turns an example's part of a batch's loss into its loss as trained."""
        if not self._summed:
            return size
        assert self.training_batch_size is not None
        return self.training_batch_size

    def sampled_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return sampled_gauss_newton_loss(self, module, batch)

    def standard_losses(self, module: nn.Module, batch: Batch) -> tuple[list[WeightedLoss], int]:
        parts = self._parts(module, batch)
        factor = self._examples_per_mean(parts.batch)
        return [replace(loss, weights=loss.weights * factor) for loss in parts.losses], parts.batch

    def standard_outputs(self, module: nn.Module, batch: Batch) -> list[Tensor]:
        with silenced(module):
            return standard_outputs(lambda: run_training_step(module, batch))

    def prediction(self, module: nn.Module, batch: Batch) -> list[str] | None:
        parts = self._parts(module, batch)
        if not parts.losses or not self.separable:
            return None
        return parts.losses[0].loss.describe(parts.batch)

    def settings(self) -> dict[str, object]:
        masses = [None if mass is None else float(mass) for mass in self._masses]
        return {
            **super().settings(),
            "training_step": self._training_step,
            "mass_per_example": masses,
            "summed_over": self.training_batch_size if self._summed else None,
        }

    def _parts(
        self, module: nn.Module, batch: Batch, masses: Sequence[Tensor | None] | None = None
    ) -> LossParts:
        masses = self._masses if masses is None else masses
        with silenced(module):
            size = batches.num_examples(batch)
            return intercept(lambda: run_training_step(module, batch), masses, size)

    def _fix_masses(self, parts: LossParts) -> None:
        self._masses = [
            call.mass / parts.batch
            if call.mass is not None
            and call.reduction == "mean"
            and float(call.mass) != call.loss.values.numel()
            else None
            for call in parts.calls
        ]
        if any(mass is not None for mass in self._masses):
            self.notes.append(
                "training_step averages with weights (class weights or ignored targets): the sum "
                "of weights that a batch mean divides by is held at its average in the first "
                "batch of the attribution."
            )

    def _check_weights(self, parts: LossParts) -> None:
        terms = [(item.weights * item.loss.values).detach() for item in parts.losses]
        rest = float(parts.total.detach().sum() - sum(term.sum() for term in terms))
        size = sum(float(term.abs().sum()) for term in terms)
        if abs(rest) > 1e-3 * size:
            self._note(
                f"training_step adds {rest:.3g} to the standard losses' {size:.3g} (a regulariser, "
                "another loss, or a nonlinear function of them): this part belongs to no example "
                "and is left out of the gradients of single examples."
            )
        if any(bool((item.weights < 0).any()) for item in parts.losses):
            self._can_sample = False
            self._note(
                "training_step subtracts a standard loss: there is no Gauss-Newton matrix of it, "
                "and curvature is the empirical Fisher."
            )

    def _check_alone(self, module: nn.Module, batch: Batch, size: int) -> None:
        """Compare an example's loss in the batch with its loss in a batch of one."""
        if size == 1:
            return
        devices = {item.device for item in module.parameters() if item.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(devices):
            with watching_noise() as noise:
                losses = self.train_loss(module, batch)
            again = self.train_loss(module, batch)
            if not torch.allclose(losses, again):
                self.notes.append("training_step draws random numbers: its losses differ by call.")
                return
            if "partners" in noise:
                return  # the loss of an example that is mixed with another is its row's
            try:
                alone = torch.cat(
                    [self._loss_alone(module, batch, index, size) for index in (0, size - 1)]
                )
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError):
                return  # the step needs more than one example: nothing to compare with
        together = losses[[0, -1]]
        precise = losses.dtype in (torch.float32, torch.float64)
        allowed = (1e-3 if precise else 3e-2) * float(losses.abs().mean())
        if (together - alone).abs().max() <= allowed:
            return
        if (together - size * alone).abs().max() <= allowed:
            self._sum_over_batch()
        else:
            self._note(
                f"The losses of the first and last example are {_short(together)} in their batch "
                f"but {_short(alone)} alone: training_step mixes examples (a contrastive loss, "
                "batch statistics) or flattens them with another axis leading. Scores then mean "
                "little; give a task whose train_loss is each example's own."
            )

    def _loss_alone(self, module: nn.Module, batch: Batch, index: int, size: int) -> Tensor:
        """The loss of the example at ``index``, in a batch of its own."""
        examples = active_examples()
        if examples is None:
            examples = torch.arange(size)
        with seeded_examples(0, examples[index : index + 1]):
            return self.train_loss(module, batches.take(batch, index, size))

    def _sum_over_batch(self) -> None:
        if self.training_batch_size is None:
            raise ValueError(
                "training_step sums its loss over the batch, and how large the training batches "
                "were is not recorded. Give a task, or set task.training_batch_size."
            )
        self._summed = True
        self.notes.append(
            f"training_step sums its loss over batches of {self.training_batch_size}: curvature "
            "and gradients are those of that sum. Where the order of batches is averaged out, a "
            "smaller last batch counts as a full one."
        )

    def _note(self, text: str) -> None:
        self.notes.append(text)
        warnings.warn(text, stacklevel=4)


def _short(values: Tensor) -> str:
    return " and ".join(f"{value:.4g}" for value in values.tolist())


def run_training_step(module: nn.Module, batch: Batch) -> Tensor:
    """The loss that ``training_step`` returns for the batch, as a tensor or under ``"loss"``."""
    step = getattr(module, "training_step", None)
    if not callable(step):
        raise ValueError(
            f"{type(module).__name__} has no training_step: with task=None the module must be a "
            "LightningModule. Give a task, for example ClassificationTask()."
        )
    arguments = [
        parameter
        for parameter in inspect.signature(step).parameters.values()
        if parameter.kind != parameter.KEYWORD_ONLY and parameter.kind != parameter.VAR_KEYWORD
    ]
    takes_index = len(arguments) > 1 or arguments[0].kind == arguments[0].VAR_POSITIONAL
    restart_noise()
    # The number of the batch in its epoch, where it is known; and that of the only loader.
    trainer = stand_in_of(module)
    number = 0 if trainer is None or trainer.moment is None else trainer.moment.batch
    asked = [argument for argument in arguments if argument.default is argument.empty]
    further = (number, 0) if len(asked) > 2 else (number,)
    loss = step(batch, *further) if takes_index else step(batch)
    if isinstance(loss, Mapping):
        loss = loss.get("loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            "Expected training_step to return one loss, as a scalar tensor or under 'loss' in a "
            f"dictionary, got {got}. Give a task instead."
        )
    return loss
