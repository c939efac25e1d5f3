"""What attribution asks of a training problem: its loss, one number per example."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.runtime.digests import source_digest
from tda_lightning.tasks import batches
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.curved_losses import (
    CurvedLoss,
    Losses,
    all_in_closed_form,
    run_graph,
    standard_outputs,
    weighted_losses,
)
from tda_lightning.tasks.loss_calls import by_position_of, inside_transform
from tda_lightning.tasks.loss_terms import joined_terms, terms_of
from tda_lightning.tasks.model_output import (
    ModelOutput,
    NoModelOutputError,
    output_of_losses,
)
from tda_lightning.tasks.output_curvature import (
    Form,
    UnknownOutputsError,
    curvature_of_outputs,
    output_rows,
)
from tda_lightning.tasks.penalty import Penalty


class AttributionTask(ABC):
    """The training loss and the measurement of single examples.

    A subclass gives :meth:`train_loss`; the rest has defaults. Losses are those of the loss *as
    optimised*: the loss of a training batch is the mean of ``train_loss`` over its examples. A sum
    in place of a mean over tokens would multiply the curvature by the number of tokens.

    Attributes:
        layers: names of modules (or their prefixes) whose parameters count; None for all.
        training_batch_size: examples per batch in training, where that is known; set before
            :meth:`prepare`. A loss that *sums* over its batch needs it.
        one_by_one: True when the losses of a batch are those of its examples run alone: gradients
            are then taken one example at a time.
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
    training_batch_size: int | None = None
    one_by_one: bool = False
    _in_closed_form: bool | None = None  # whether the losses are standard ones; None: not known
    _form: Form | None = None
    draws: int = 1

    @abstractmethod
    def train_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Loss of each example as trained, [batch]."""

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        """What is explained for each query, [batch]; smaller when the model does better."""
        return self.train_loss(module, batch)

    def measurement_part(self, module: nn.Module, batch: Batch, part: Tensor) -> Tensor:
        """One of the measurements that :meth:`measurement` is the mean of (the timesteps of a
        diffusion model), by its number for each query, int64 [batch]: [batch]."""
        raise NotImplementedError(f"{type(self).__name__} has a measurement in one part.")

    @property
    def measured_parts(self) -> int:
        """How many measurements :meth:`measurement` is the mean of."""
        return 1

    @property
    def kept_parts(self) -> Sequence[int] | None:
        """Timesteps whose scores are kept one by one (``Scores.by_timestep``), one for each part of
        the measurement; None: the mean alone."""
        return None

    def loss_as_drawn(self, module: nn.Module, batch: Batch) -> Tensor:
        """:meth:`train_loss` of a batch of the run with the random numbers that the run drew: for a
        task that draws others than the module's ``training_step``, that of the step."""
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
            run, read = self.loss_graph(module, batch)
            count = batches.num_examples(batch)
            terms = by_position_of(weighted_losses(module, run, read)[0], count)
            share = self.share(count)
            return terms.sum() * share, terms * share
        losses = self.train_loss(module, batch)
        return losses.sum() * self.share(len(losses)), losses * self.share(len(losses))

    def loss_terms(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The terms that each example's ``train_loss`` is the sum of (the tokens of a sequence),
        [batch, position], and whether each counts, bool [batch, position].

        Raises:
            ValueError: they are not known.
        """
        count = batches.num_examples(batch)
        if self.one_by_one and count > 1:
            return joined_terms(batches.each_alone(batch, lambda one: self.loss_terms(module, one)))
        return terms_of(module, *self.loss_graph(module, batch), count)

    def measurement_terms(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same of each query's measurement.

        Raises:
            ValueError: it is another than the loss, and its terms are not known.
        """
        if self.measures_loss:
            return self.loss_terms(module, batch)
        raise ValueError(
            f"The tokens that the measurement of {type(self).__name__} is made of are not known. "
            "Ask by attribute(measurement=...), or give the task measurement_terms(module, batch)."
        )

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
            f"{type(self).__name__} has no sampled_loss, so curvature is the empirical Fisher. For "
            "the Gauss-Newton matrix define sampled_loss as "
            "tda_lightning.tasks.sampled_gauss_newton_loss(self, module, batch)."
        )

    def model_output(self, module: nn.Module, batch: Batch) -> ModelOutput:
        """The number f of each example that its training loss is a function of, and the derivative
        of the loss by it: what TRAK linearises. By default that of standard losses
        (:mod:`~tda_lightning.tasks.model_output`): the log-odds of the label, or the residual.

        Raises:
            NoModelOutputError: the loss is none of these.
        """
        try:
            with torch.enable_grad():
                losses, count = self.curved_losses(module, batch)
            return output_of_losses(losses, count)
        except (UnknownOutputsError, NoModelOutputError) as error:
            raise NoModelOutputError(
                "TRAK needs the output of the model that the training loss is a function of (the "
                "log-odds of the label, the residual), and that of this loss is not known: "
                f"{error}. Give a task that has model_output(module, batch), or use "
                "InfluenceFunction or Source."
            ) from error

    @property
    def can_sample(self) -> bool:
        """Whether :meth:`sampled_loss` may be called."""
        return type(self).sampled_loss is not AttributionTask.sampled_loss

    def prepare(self, module: nn.Module, batch: Batch) -> None:
        """Look at one training batch before the work starts; earlier notes are forgotten."""
        self.notes.clear()
        self._in_closed_form = self._form = None

    def average(  # noqa: B027 (most tasks need none)
        self, module: nn.Module, training_set: Callable[[], Iterable[tuple[Batch, Tensor]]]
    ) -> None:
        """Take averages over the training set that losses need; by default none are.

        Args:
            training_set: gives its batches, with the indices of their examples.
        """

    def check_losses(self, module: nn.Module, batch: Batch) -> None:  # noqa: B027 (optional)
        """Refuse losses of examples that do not make up what was trained, on this batch. Losses
        that a task writes down itself have nothing to be compared with."""

    @property
    def prepared(self) -> bool:
        """Whether losses and measurements are those of single examples; else :meth:`prepare` is to
        be called first."""
        return True

    @property
    def penalty(self) -> Penalty:
        """What training adds to the losses of examples that depends on none of them."""
        return Penalty()

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

    def outputs(self, module: nn.Module, batch: Batch) -> Sequence[Tensor] | None:
        """The outputs of the network, where they cannot be found: the tensors [batch, ...] on the
        way from the parameters to the loss in which the loss is differentiated twice, for the
        Gauss-Newton matrix of a loss that is no standard one. None: what modules with parameters
        return. They are found in the run of ``train_loss`` by their values."""
        return None

    def loss_graph(self, module: nn.Module, batch: Batch) -> tuple[Callable[[], Tensor], Losses]:
        """What runs the training loss, and what reads the losses [batch] off its graph."""
        return lambda: self.train_loss(module, batch), lambda node: node.value

    def curved_losses(self, module: nn.Module, batch: Batch) -> tuple[Sequence[CurvedLoss], int]:
        """The losses that ``train_loss`` consists of with their second derivatives in the outputs
        of the network, and the number of examples.

        Raises:
            UnknownOutputsError: the outputs cannot be found, or are too many.
        """
        run, read = self.loss_graph(module, batch)
        count = batches.num_examples(batch)
        if self._in_closed_form is False:
            total = run_graph(module, run)[1]
        else:
            standard, total, losses = weighted_losses(module, run, read)
            if not inside_transform():  # in every batch: a part may be zero in the first
                self._in_closed_form = all_in_closed_form(standard, losses)
            if self._in_closed_form is not False:
                return [replace(loss, weights=loss.weights.detach()) for loss in standard], count
        marked = self._marked(module, batch)
        curvature = curvature_of_outputs(total, read, count, self._form, marked)
        self._form = curvature.form
        self._note_indefinite(curvature.indefinite)
        return [curvature.loss], count

    def curved_outputs(self, module: nn.Module, batch: Batch) -> list[Tensor]:
        """What those losses are of, by number: in a forward-mode derivative all that is needed."""
        run, _ = self.loss_graph(module, batch)
        if self._in_closed_form is not False:
            return standard_outputs(module, run)
        _, total = run_graph(module, run)
        return [output_rows(total, batches.num_examples(batch), self._marked(module, batch))]

    def _marked(self, module: nn.Module, batch: Batch) -> Sequence[Tensor]:
        with torch.no_grad():  # unseen by those who watch the run with gradients
            return self.outputs(module, batch) or ()

    def _note_indefinite(self, indefinite: bool) -> None:
        if indefinite and INDEFINITE not in self.notes:
            self.notes.append(INDEFINITE)


INDEFINITE = (
    "The second derivative of the training loss in the outputs of the network has negative "
    "eigenvalues, so there is no Gauss-Newton matrix in the strict sense: their absolute values "
    "take their place."
)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    try:
        return list(value)
    except TypeError:
        return repr(value)
