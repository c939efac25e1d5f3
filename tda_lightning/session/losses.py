"""The losses of training examples and the measurements of queries, with the noise that they draw.

Draws are seeded by example, so that a loss is the same function of the weights wherever it is
computed; with several draws it is their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tda_lightning.measurements import Measurement
from tda_lightning.session.parts import are_parts, own_indices, part_numbers
from tda_lightning.session.query_rows import QueryRows
from tda_lightning.tasks import (
    MEASURED_SEED,
    AttributionTask,
    gauss_newton_losses,
    numbered_draw,
    seeded_examples,
)
from tda_lightning.tasks.loss_calls import inside_transform
from tda_lightning.tasks.model_output import ModelOutput
from tda_lightning.tasks.recorded_noise import RecordedNoise

Loss = Callable[[nn.Module, object, Tensor], Tensor]  # of (module, batch, examples), [batch]
_TRAINING = 0  # the seed of the noise of training losses


@dataclass(frozen=True)
class Losses:
    """The functions (module, batch, examples) -> [batch] whose gradients an attribution takes.

    Attributes:
        task: the training loss and the measurement.
        asked: what is measured of the queries; None: the task's own measurement.
        rows: the tokens of queries, where these are taken apart.
        draws: over how many draws of their noise losses and measurements are averaged.
    """

    task: AttributionTask
    asked: Measurement | None
    rows: QueryRows | None
    draws: int

    def each_draw(self) -> Iterator[int]:
        """Numbers of the draws; what is drawn in the meantime is that draw's."""
        for number in range(self.draws):
            with numbered_draw(number):
                yield number

    def train(self, module: nn.Module, batch: object, examples: Tensor) -> Tensor:
        """The training loss of each example, the mean over draws."""
        return self._mean(lambda: self.task.train_loss(module, batch), _TRAINING, examples)

    def train_once(self, module: nn.Module, batch: object, examples: Tensor) -> Tensor:
        """The training loss of each example at one draw."""
        with seeded_examples(_TRAINING, examples):
            return self.task.train_loss(module, batch)

    def as_drawn(self, noise: RecordedNoise) -> Loss:
        """The training loss with what the run drew for this batch."""

        def recorded(module: nn.Module, part: object, indices: Tensor) -> Tensor:
            with seeded_examples(_TRAINING, indices, own_noise=False), noise.drawn():
                return self.task.loss_as_drawn(module, part)

        return recorded

    def train_terms(self, noise: RecordedNoise | None) -> Loss:
        """The terms [batch, position] of the training loss at one draw, or as the run drew."""

        def terms(module: nn.Module, data: object, examples: Tensor) -> Tensor:
            if noise is None:
                with seeded_examples(_TRAINING, examples):
                    return self.task.loss_terms(module, data)[0]
            with seeded_examples(_TRAINING, examples, own_noise=False), noise.drawn():
                return self.task.loss_terms(module, data)[0]

        return terms

    def sampled(self, seed: int) -> Loss:
        """The loss under labels that the model samples, at one draw."""

        def loss(module: nn.Module, part: object, indices: Tensor) -> Tensor:
            with seeded_examples(seed, indices):
                return self.task.sampled_loss(module, part)

        return loss

    def gauss_newton(self, module: nn.Module, part: object, indices: Tensor) -> Iterable[Tensor]:
        """Losses whose gradients' outer products sum to the Gauss-Newton matrix, at one draw."""
        with seeded_examples(_TRAINING, indices):
            return gauss_newton_losses(self.task, module, part)

    def model_output(self, module: nn.Module, part: object, indices: Tensor) -> ModelOutput:
        """The output that the training loss is a function of, at one draw."""
        with seeded_examples(_TRAINING, indices):
            return self.task.model_output(module, part)

    def measurement(self, module: nn.Module, batch: object, examples: Tensor) -> Tensor:
        """The measurement of each example, or the parts of it that ``examples`` name
        (:mod:`~tda_lightning.session.parts`); the mean over draws."""
        if self.asked is None and not inside_transform() and are_parts(examples):
            return self.part(module, batch, examples)
        return self._mean(
            lambda: self._measured(module, batch, examples), MEASURED_SEED, self._queries(examples)
        )

    def measured_once(self, module: nn.Module, batch: object, examples: Tensor) -> Tensor:
        """The measurement at one draw."""
        with seeded_examples(MEASURED_SEED, self._queries(examples)):
            return self._measured(module, batch, examples)

    def part(self, module: nn.Module, batch: object, indices: Tensor) -> Tensor:
        """The parts of the measurement that ``indices`` name; the mean over draws."""
        part = part_numbers(indices)
        return self._mean(
            lambda: self.task.measurement_part(module, batch, part),
            MEASURED_SEED,
            own_indices(indices),
        )

    def part_once(self, module: nn.Module, batch: object, indices: Tensor) -> Tensor:
        """The same at one draw."""
        with seeded_examples(MEASURED_SEED, own_indices(indices)):
            return self.task.measurement_part(module, batch, part_numbers(indices))

    def measured_terms(
        self, module: nn.Module, batch: object, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Numbers [query, position] whose gradients sum to that of each query's measurement, and
        which positions they are of."""
        if self.asked is None:
            return self.task.measurement_terms(module, batch)
        return self.asked.terms(self.task, module, batch, queries)

    def _queries(self, examples: Tensor) -> Tensor:
        """The queries that rows are of, where queries are taken apart; otherwise as given."""
        return examples if self.rows is None else self.rows.query.to(examples.device)[examples]

    def _measured(self, module: nn.Module, batch: object, examples: Tensor) -> Tensor:
        """The measurement with one draw of its noise, from the seeds that are active."""
        if self.rows is not None:
            terms = self.measured_terms(module, batch, self._queries(examples))[0]
            place = self.rows.position.to(examples.device)[examples]
            return terms.gather(1, place[:, None]).squeeze(1)
        if self.asked is None:
            return self.task.measurement(module, batch)
        return self.asked.measure(self.task, module, batch, examples)

    def _mean(self, loss: Callable[[], Tensor], seed: int, examples: Tensor) -> Tensor:
        losses = []
        for _ in self.each_draw():
            with seeded_examples(seed, examples):
                losses.append(loss())
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)
