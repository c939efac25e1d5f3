"""``task=None``: the module's own ``training_step`` is the training loss and the measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from tda_lightning.records.errors import UnseenBatchError, UnsupportedTrainingError
from tda_lightning.runtime.digests import digest, source_digest
from tda_lightning.runtime.module_state import doubled, in_double, restored
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.runtime.silence import silenced
from tda_lightning.tasks import batches
from tda_lightning.tasks.base import INDEFINITE, AttributionTask
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.curved_losses import CurvedLoss, Losses, run_graph, weighted_losses
from tda_lightning.tasks.example_parts import (
    Average,
    Divide,
    Layout,
    Mass,
    Part,
    Reader,
    Site,
    UnreadableLossError,
)
from tda_lightning.tasks.example_seeds import active_examples, active_seed, seeded_examples
from tda_lightning.tasks.gauss_newton import sampled_gauss_newton_loss
from tda_lightning.tasks.loss_calls import by_position_of, inside_transform
from tda_lightning.tasks.loss_terms import joined_terms, terms_of
from tda_lightning.tasks.node_batch import NodeBatch
from tda_lightning.tasks.output_curvature import OutputLoss, UnknownOutputsError
from tda_lightning.tasks.penalty import Penalty, penalty_of
from tda_lightning.tasks.plain_step import run_training_step
from tda_lightning.tasks.step_check import compare_with_plain_steps
from tda_lightning.tasks.step_graph import Node, StepGraph
from tda_lightning.tasks.step_layout import learn_layout, learn_masses
from tda_lightning.tasks.step_noise import UNSEEN, watching_noise

Result = TypeVar("Result")
_VARIES = 1e-6  # relative change of a mass per example between batches that is more than rounding


@dataclass
class _Surprises:
    """What a batch has shown that the first ones did not.

    Copies of a task share it: an attribution that begins again for it may copy the task anew.
    """

    needs_averages: bool = False
    needs_alone: bool = False

    def __deepcopy__(self, memo: object) -> _Surprises:
        return self


class TrainingStepTask(AttributionTask):
    r"""Losses of single examples from an unchanged ``training_step``, with any loss.

    The loss of an example is what makes the batch's loss, differentiated with respect to the
    example's weight, come out as trained (docs/methods.md, "The loss of an example"):

    .. math::
        l_n = B\, \partial L_B / \partial w_n

    with the weights inside the sums and means over the batch, and not in what a mean divides by.
    Penalties that depend on no data belong to no example.

    :meth:`prepare` runs one batch and its examples one by one, and finds out where the step sums
    over examples (``example_parts.py``). That is an acceleration: it is compared with
    ``training_step`` itself, by values and by gradients. A step that cannot be taken apart in a
    batch is run for every example alone, with a note. One whose examples depend on one another is
    refused.

    A weighted mean (class weights, masks) divides by a number that differs between batches. An
    example's loss takes its average for an example (:meth:`average`), so that it does not
    depend on the batch that it comes in. The measurement of a query is the mean over its own terms.

    A step that *sums* over its batch has the gradient of a mean over ``training_batch_size``
    examples of as many times the loss, and the measurement of a query is the loss itself.

    Args:
        layers: names of modules (or prefixes) to restrict to.
        indefinite: what stands for the Gauss-Newton matrix of a loss whose second derivative in
            the network's outputs has negative eigenvalues: their absolute values, or the
            empirical Fisher.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        indefinite: Literal["absolute", "fisher"] = "absolute",
    ) -> None:
        if indefinite not in ("absolute", "fisher"):
            raise ValueError(f"indefinite must be 'absolute' or 'fisher', got {indefinite!r}.")
        self.layers = layers
        self.indefinite = indefinite
        self._surprises = _Surprises()
        self._reset()

    def _reset(self) -> None:
        self.one_by_one = False
        self._can_sample = True
        self._summed = False
        self._own_terms = False  # whether the number of terms differs between examples
        self._layout: Layout | None = None
        self._averages: dict[Site, Average] = {}
        self._varying = False
        self._mixed = self._measured_alone = False
        self._known_batches: set[str] = set()
        self._training_step: list[str | None] = []
        self._penalty = Penalty()

    @property
    def penalty(self) -> Penalty:
        return self._penalty

    @property
    def can_sample(self) -> bool:
        return self._can_sample

    @property
    def prepared(self) -> bool:
        return bool(self._training_step)

    # Losses.

    def train_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        if self.one_by_one and batches.num_examples(batch) > 1:
            losses = torch.cat(batches.each_alone(batch, lambda one: self.train_loss(module, one)))
        else:
            parts, count = self._parts(module, batch, "held" if self._training_step else "own")
            losses = self._as_trained(parts, count)
        return losses if torch.is_grad_enabled() else losses.detach()

    def batch_loss(
        self, module: nn.Module, batch: Batch, by_position: bool = False
    ) -> tuple[Tensor, Tensor]:
        # What a mean divides by is this batch's own, not held as for single examples.
        count = batches.num_examples(batch)
        if by_position:
            # One run: in train mode another would draw other dropout.
            run, _ = self.loss_graph(module, batch)
            losses, total, _ = weighted_losses(
                module, run, lambda node: _sum(self._reader(count, "own").read(node), count)
            )
            return total.value.reshape(()), by_position_of(losses, count)
        if self.one_by_one and count > 1:
            return self._batch_loss_one_by_one(module, batch)
        return self._loss_and_parts(module, batch, self._run(module, batch)[1])

    def loss_of_step(
        self, module: nn.Module, batch: Batch, step: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """:meth:`batch_loss` of a ``training_step`` that the trainer has called itself, once.

        Args:
            step: runs it and returns its loss.
        """
        with torch.enable_grad():
            return self._loss_and_parts(module, batch, run_graph(module, step)[1])

    def _loss_and_parts(
        self, module: nn.Module, batch: Batch, total: Node
    ) -> tuple[Tensor, Tensor]:
        count = batches.num_examples(batch)
        reader = self._reader(count, "own")
        parts = _sum(self._read(reader, total, count), count)
        self._require_known_rows(module, batch, reader)
        return total.value.reshape(()), parts

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        if self.measures_loss:
            return self.train_loss(module, batch)
        alone = self.one_by_one or self._measured_alone
        if alone and batches.num_examples(batch) > 1:
            values = torch.cat(batches.each_alone(batch, lambda one: self.measurement(module, one)))
        else:
            values = _sum(*self._parts(module, batch, "each"))
        return values if torch.is_grad_enabled() else values.detach()

    def measurement_terms(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.measures_loss:
            return self.loss_terms(module, batch)
        alone = self.one_by_one or self._measured_alone
        if alone and batches.num_examples(batch) > 1:
            return joined_terms(
                batches.each_alone(batch, lambda one: self.measurement_terms(module, one))
            )
        count = batches.num_examples(batch)

        def read(total: Node) -> Tensor:
            return _sum(self._reader(count, "each").read(total), count)

        return terms_of(module, self.loss_graph(module, batch)[0], read, count)

    @property
    def measures_loss(self) -> bool:
        return not self._summed and not self._own_terms

    def share(self, size: int) -> float:
        return 1 / (self._full_batch if self._summed else size)

    @property
    def _full_batch(self) -> int:
        assert self.training_batch_size is not None
        return self.training_batch_size

    def _run(self, module: nn.Module, batch: Batch) -> tuple[StepGraph, Node]:
        """The graph of a step, and its loss."""
        # With gradients in any case: the step itself may take some.
        with silenced(module), torch.enable_grad():
            return run_graph(module, lambda: run_training_step(module, batch))

    def _reader(self, count: int, divide: Divide) -> Reader:
        return Reader(count, self._layout, divide, self._averages, alone=self.one_by_one)

    def _parts(self, module: nn.Module, batch: Batch, divide: Divide) -> tuple[list[Part], int]:
        """The parts of a batch's loss, and its number of examples."""
        count = batches.num_examples(batch)
        reader = self._reader(count, divide)
        parts = self._read(reader, self._run(module, batch)[1], count)
        self._require_known_rows(module, batch, reader)
        if divide == "held" and not self._varying:
            self._require_constant_masses(reader.masses, count)
        return parts, count

    def _read(self, reader: Reader, total: Node, count: int) -> list[Part]:
        try:
            return reader.read(total)
        except UnreadableLossError as error:
            self._surprises.needs_alone = bool(self._training_step)
            raise UnseenBatchError(
                f"The loss of this batch of {count} examples is made otherwise than that of the "
                f"first one ({error}). Give a task whose train_loss holds for every batch."
            ) from error

    def _require_known_rows(self, module: nn.Module, batch: Batch, reader: Reader) -> None:
        """Where data decide which row is of which example (a mask, a sort), compare the losses of
        the batch with those of its examples alone, in eval mode and once for a batch."""
        if not (reader.moved and self._training_step) or inside_transform():
            return
        if reader.batch == 1 or self._mixed or isinstance(batch, NodeBatch):
            return  # a mask has the same rows, of which more or fewer are chosen
        name = digest(batch)
        if name in self._known_batches:
            return
        with restored(module, "modes"), unchanged_randomness():
            module.eval()
            # Whatever the step draws otherwise, here an example draws the same in both.
            examples = active_examples()
            if examples is None:
                examples = torch.arange(reader.batch)
            with seeded_examples(active_seed(), examples):
                together = self._held_alike(module, batch, reader.batch)
            alone = torch.cat(
                batches.each_alone(batch, lambda one: self._held_alike(module, one, 1))
            )
        eps = torch.finfo(together.dtype).eps
        if not bool((together - alone).abs().max() <= eps**0.6 * together.abs().max()):
            self._surprises.needs_alone = True
            raise UnseenBatchError(
                "The rows of a batch are not those of its examples in their order (a mask or a "
                "sort of the data), and were so in the first batch."
            )
        self._known_batches.add(name)

    def _held_alike(self, module: nn.Module, batch: Batch, count: int) -> Tensor:
        total = self._run(module, batch)[1]
        parts = self._read(self._reader(count, "held"), total, count)
        return self._as_trained(parts, count).detach()

    def _require_constant_masses(self, masses: Mapping[Site, Mass], count: int) -> None:
        if inside_transform():
            return
        for site, mass in masses.items():
            held = self._averages[site].per_example
            if bool(((mass.total.detach() / count - held).abs() > _VARIES * held).any()):
                self._surprises.needs_averages = True
                raise UnseenBatchError(
                    "What the training loss divides by differs between batches, and did not "
                    "between the first ones: its average over the training set is needed."
                )

    def _as_trained(self, parts: Sequence[Part], count: int) -> Tensor:
        """l_n, [batch], from the parts of a batch's loss."""
        if not self._training_step:  # not prepared: all is this batch's own
            return _sum(parts, count) * count
        size = self._full_batch if self._summed else 1
        return _sum(
            [part if part.divided else replace(part, values=part.values * size) for part in parts],
            count,
        )

    def _batch_loss_one_by_one(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """A mass of the batch is the sum of those of its examples."""
        with silenced(module):
            whole = run_training_step(module, batch).reshape(())
        masses: dict[Site, Tensor | float] = {}
        steps = batches.each_alone(batch, lambda one: self._run(module, one)[1])
        for total in steps:
            reader = self._reader(1, "own")
            own = _sum(reader.read(total), 1)
            for site, mass in reader.masses.items():
                masses[site] = masses.get(site, 0.0) + mass.total.detach()
        penalty = steps[-1].value.detach() - own.detach()
        averages = {site: Average(float(mass), 1.0) for site, mass in masses.items()}
        parts = torch.cat(
            [
                _sum(Reader(1, self._layout, "held", averages, alone=True).read(total), 1)
                for total in steps
            ]
        )
        rest = whole.detach() - parts.detach().sum()
        eps = torch.finfo(whole.dtype).eps
        if not bool((rest - penalty).abs() <= eps**0.4 * whole.detach().abs()):
            raise UnsupportedTrainingError(
                "The losses that training_step gives for single examples do not make up that of "
                "their batch: its examples depend on one another (a contrastive loss; dropout or "
                "batch statistics in train mode), and the loss cannot be taken apart in a batch; "
                "or it averages one loss over the batch and sums another, which examples alone do "
                "not tell apart. Give a task whose train_loss gives the losses of a batch, or take "
                "means of both."
            )
        return whole, parts

    # The Gauss-Newton matrix.

    def sampled_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return sampled_gauss_newton_loss(self, module, batch)

    def loss_graph(self, module: nn.Module, batch: Batch) -> tuple[Callable[[], Tensor], Losses]:
        count = batches.num_examples(batch)
        divide: Divide = "held" if self._training_step else "own"

        def run() -> Tensor:
            with silenced(module):
                return run_training_step(module, batch)

        def read(total: Node) -> Tensor:
            return self._as_trained(self._reader(count, divide).read(total), count)

        return run, read

    def curved_losses(self, module: nn.Module, batch: Batch) -> tuple[Sequence[CurvedLoss], int]:
        count = batches.num_examples(batch)
        if not self.one_by_one or count == 1:
            return super().curved_losses(module, batch)
        own = super().curved_losses
        losses: list[CurvedLoss] = []
        for example, parts in enumerate(batches.each_alone(batch, lambda one: own(module, one)[0])):
            for loss in parts:
                losses.append(replace(loss, number=len(losses), example=example))
        return losses, count

    def curved_outputs(self, module: nn.Module, batch: Batch) -> list[Tensor]:
        if not self.one_by_one or batches.num_examples(batch) == 1:
            return super().curved_outputs(module, batch)
        own = super().curved_outputs
        alone = batches.each_alone(batch, lambda one: own(module, one))
        return [outputs for single in alone for outputs in single]

    def prediction(self, module: nn.Module, batch: Batch) -> list[str] | None:
        graph, _ = self._run(module, batch)
        count = batches.num_examples(batch)
        values = graph.calls[0].loss.values if graph.calls else None
        if values is None or not values.dim() or len(values) % count:
            return None
        return graph.calls[0].loss.describe(count)

    def settings(self) -> dict[str, object]:
        return {
            **super().settings(),
            "training_step": self._training_step,
            "mass_per_example": [average.per_example for average in self._averages.values()],
            "summed_over": self.training_batch_size if self._summed else None,
        }

    # What is learned from a batch.

    def prepare(self, module: nn.Module, batch: Batch) -> None:
        """Learn from one batch, and from its examples alone, how the step's loss is made.

        Raises:
            UnsupportedTrainingError: the examples of a batch depend on one another; a batch of one
                example cannot be run.
            ValueError: a sum over the batch whose size in training is not known.
        """
        super().prepare(module, batch)
        self._reset()
        kind = type(module)
        with torch.enable_grad(), watching_noise() as noise:
            _, whole = self._run(module, batch)
            alone = self._run_alone(module, batch)
        # An example that is mixed with others of its batch (mixup) is mixed with itself alone: its
        # loss is that of its row.
        self._mixed = mixed = "partners" in noise
        reason = ""
        try:
            if self._surprises.needs_alone:
                raise UnreadableLossError("some batches are made otherwise than others")
            try:
                self._layout = learn_layout(whole, alone, same_values=not mixed)
            except UnreadableLossError:
                if mixed or noise.isdisjoint(UNSEEN):
                    raise
                # Noise of a place in the batch: alone, every example has that of the first place.
                self._mixed = mixed = True
                self._layout = learn_layout(whole, alone, same_values=False)
            if len(alone) == 1:  # a batch of one compares nothing
                self._masses_alone(alone)
        except UnreadableLossError as error:
            if mixed:
                what = "mixes each example with another of its batch"
                if "partners" not in noise:
                    what = "draws noise by the place in a batch"
                raise ValueError(
                    f"training_step {what}, and its loss cannot be taken apart in a batch "
                    f"({error}). Give a task."
                ) from error
            self.one_by_one = True
            self._layout = learn_masses(alone)
            reason = str(error)
        self._training_step = [f"{kind.__module__}.{kind.__qualname__}", source_digest(kind)]
        masses = self._masses_alone(alone)
        if any(mass.total.requires_grad for own in masses.values() for mass in own):
            raise UnsupportedTrainingError(
                "training_step divides by a sum over the batch that the model changes (learned "
                "weights or confidences, normalised in the batch), so the loss of an example "
                "depends on the others. Give a task with a divisor that is no sum over the batch, "
                "or detach it."
            )
        if self.one_by_one:
            self._find_whole_losses(module, batch)
        masses = self._masses_alone(alone)
        self._averages = {site: _average(own) for site, own in masses.items()}
        parts = self._reader(1, "held").read(alone[0])
        if any(not part.divided for part in parts):
            self._sum_over_batch()
        # A query may have other numbers of terms than the examples looked at.
        self._own_terms = self._surprises.needs_averages or any(
            _differ(mass.counts for mass in own) for own in masses.values()
        )
        # Of a divisor that is a number to torch, only that of an example alone is known.
        reader = self._reader(len(alone), "own")
        self._measured_alone = self._own_terms and (
            self.one_by_one or any(m.counts is None for m in self._masses_of(reader, whole))
        )
        self._varying = self._surprises.needs_averages or any(
            _differ(mass.total for mass in own) for own in masses.values()
        )
        if self._varying:
            self.notes.append(
                "training_step averages with weights (class weights, masks, ignored targets): the "
                "sum of weights that a mean divides by is held at its average for an example."
            )
        if self.one_by_one and len(alone) > 1:
            self.notes.append(
                f"training_step cannot be taken apart in a batch ({reason}): every example is run "
                "alone, which is slow. A task whose train_loss gives the losses of a batch would "
                "be faster."
            )
        self.check_losses(module, batch, some=True)
        self._penalty = self._find_penalty(module, batch)
        self.notes.extend(note for note in self._penalty.notes if note not in self.notes)
        self._find_curvature(module, batch)

    def _find_penalty(self, module: nn.Module, batch: Batch) -> Penalty:
        """In float64 where the step allows it: small penalties drown in rounding."""

        def rest(own: Batch) -> tuple[Tensor, Tensor]:
            total, parts = self.batch_loss(module, own)
            return total, total - parts.sum()

        if self._mixed:
            return Penalty()
        total, left = rest(batch)
        eps = torch.finfo(total.dtype).eps
        if not bool(left.detach().abs() > eps**0.8 * total.detach().abs()):
            return Penalty()
        if total.dtype != torch.float64:
            with suppress(RuntimeError, TypeError, ValueError), in_double(module):
                double = doubled(batch)
                return penalty_of(module, lambda: rest(double))
        return penalty_of(module, lambda: rest(batch))

    def check_losses(self, module: nn.Module, batch: Batch, some: bool = False) -> None:
        """Compare losses and gradients with ``training_step`` as it is, on the batch and on its
        examples alone: on all of them, or on some.

        Raises:
            UnsupportedTrainingError: the examples of a batch depend on one another.
        """
        if not self._mixed:
            # Of a sum beside a mean, a batch of one has another share than a full batch.
            constant = not self._varying and not (self._summed and self._averages)
            compare_with_plain_steps(
                self, run_training_step, module, batch, batches.each_alone, some, constant
            )

    def average(
        self, module: nn.Module, training_set: Callable[[], Iterable[tuple[Batch, Tensor]]]
    ) -> None:
        """Where what a mean divides by differs between examples, take its average over the whole
        training set instead of the first batch: one pass, forward only."""
        if not self._varying:
            return
        sums: dict[Site, list[float]] = {}
        examples = 0

        def add(part: Batch) -> None:
            count = batches.num_examples(part)
            reader = self._reader(count, "own")
            self._read(reader, self._run(module, part)[1], count)
            for site, mass in reader.masses.items():
                counts = mass.total if mass.counts is None else mass.counts
                own = sums.setdefault(site, [0.0, 0.0])
                own[0] += float(mass.total.double().mean())
                own[1] += float(counts.double().sum())

        with torch.no_grad():
            for batch, indices in training_set():
                examples += len(indices)
                with seeded_examples(0, indices):
                    if self.one_by_one:
                        batches.each_alone(batch, add)
                    else:
                        add(batch)
        self._averages = {
            site: Average(mass / examples, mass / max(terms, 1e-300))
            for site, (mass, terms) in sums.items()
        }

    def _find_curvature(self, module: nn.Module, batch: Batch) -> None:
        """Whether the Gauss-Newton matrix of the loss can be had."""
        if next((p for p in module.parameters() if p.requires_grad), None) is None:
            return
        try:
            with torch.enable_grad():
                losses, _ = self.curved_losses(module, batch)
            if not any(_is_curved(loss) for loss in losses):
                raise UnknownOutputsError(
                    "the second derivative of the loss in the outputs of the network is 0 (an "
                    "absolute or a hinge loss, or a module that returns the losses themselves)"
                )
        except UnknownOutputsError as error:
            self._can_sample = False
            self.notes.append(f"Curvature is the empirical Fisher: {error}.")
        if self.indefinite == "fisher" and INDEFINITE in self.notes:
            self._can_sample = False
            self.notes.remove(INDEFINITE)
            self.notes.append(
                "The second derivative of the training loss in the outputs of the network has "
                "negative eigenvalues: curvature is the empirical Fisher, as asked for."
            )

    def _find_whole_losses(self, module: nn.Module, batch: Batch) -> None:
        """Whether losses of which nothing is known but their values are averaged over the batch,
        or summed."""
        assert self._layout is not None
        for self._layout.wholes_are_means in (True, False):
            with suppress(ValueError):
                self._batch_loss_one_by_one(module, batch)
                return
        self._batch_loss_one_by_one(module, batch)

    def _run_alone(self, module: nn.Module, batch: Batch) -> list[Node]:
        """The losses of the examples alone."""
        try:
            return batches.each_alone(batch, lambda one: self._run(module, one)[1])
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise UnsupportedTrainingError(
                "training_step cannot be run for one example alone, so the loss of a single "
                f"example is not known ({type(error).__name__}: {str(error)[:300]}). If it "
                "compares the examples of a batch (a contrastive loss), there is none. Otherwise "
                "give a task."
            ) from error

    def _masses_of(self, reader: Reader, total: Node) -> Iterable[Mass]:
        reader.read(total)
        return reader.masses.values()

    def _masses_alone(self, alone: Sequence[Node]) -> dict[Site, list[Mass]]:
        """The masses of examples alone, by where they stand in the step."""
        masses: dict[Site, list[Mass]] = {}
        for total in alone:
            reader = self._reader(1, "own")
            reader.read(total)
            for site, mass in reader.masses.items():
                masses.setdefault(site, []).append(mass)
        return masses

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


def _sum(parts: Sequence[Part], count: int) -> Tensor:
    """The sum of parts of a loss, [batch]."""
    if not parts:
        raise ValueError(
            "The loss that training_step returns depends on no data of the batch, so no example "
            "has a part in it. Give a task."
        )
    return torch.stack([part.values.reshape(count) for part in parts]).sum(0)


def _average(masses: Sequence[Mass]) -> Average:
    """Of the masses of single examples."""
    total = torch.stack([mass.total.detach().double().mean() for mass in masses]).mean()
    terms = [mass.total if mass.counts is None else mass.counts for mass in masses]
    count = torch.stack([own.detach().double().sum() for own in terms]).mean()
    return Average(float(total), float(total / count.clamp(min=1e-300)))


def _differ(values: Iterable[Tensor | None]) -> bool:
    known = [value.detach().double().sum() for value in values if value is not None]
    return bool(known) and bool(
        (torch.stack(known) - known[0]).abs().max() > _VARIES * known[0].abs()
    )


def _is_curved(loss: CurvedLoss) -> bool:
    return not isinstance(loss, OutputLoss) or bool(loss.roots.any())
