"""Gradients under sampled labels of some training examples, whose second moment stands for the
curvature of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tda_lightning.curvature.fit import WHOLE, Scales
from tda_lightning.curvature.products import as_matrices
from tda_lightning.curvature.shared_walk import SharedWalk
from tda_lightning.gradients import Gradient, Joined, scaled
from tda_lightning.session.session import Session, Span


@dataclass(frozen=True)
class Row:
    """Gradients h * g of a batch by block.

    Attributes:
        roots: of what each counts by in the mean over the sample, [batch].
    """

    gradients: dict[str, Gradient]
    roots: Tensor

    @cached_property
    def joined(self) -> Joined:
        """The same as one row of all parameters each."""
        return Joined(list(self.gradients.values()))


@dataclass(frozen=True)
class Sample:
    """Some training examples at each checkpoint.

    Attributes:
        session: the model and the training set.
        orders: by checkpoint, batches of example indices.
        numbers: by checkpoint, which of them are in the sample.
        scales: h of all parameters, [1, 1, parameters], by checkpoint and unit; a missing one
            is 1.
        seed: of the sampled labels.
        used: the steps whose use of examples weighs them; None: evenly.
        shared: a walk that went over the examples before; None: there was none.
    """

    session: Session
    orders: Mapping[int, Sequence[Sequence[int]]]
    numbers: Mapping[int, Sequence[int]]
    scales: Scales
    seed: int
    used: Span | None
    shared: SharedWalk | None = None

    @cached_property
    def chosen(self) -> dict[int, list[Sequence[int]]]:
        """The sample's batches of example indices by checkpoint."""
        return {step: [self.orders[step][n] for n in own] for step, own in self.numbers.items()}

    @property
    def size(self) -> int:
        """Gradients in all."""
        sizes = [len(batch) for own in self.chosen.values() for batch in own]
        return sum(sizes) * self.session.draws

    @property
    def batches(self) -> int:
        """In which they come."""
        return sum(map(len, self.chosen.values())) * self.session.draws

    @property
    def held(self) -> int:
        """Scalars that they take in memory, factored."""
        return self.size * self.session.engine.held

    def walk(self, title: str) -> Iterator[Row]:
        """This process's share of the gradients, batch by batch."""
        for step, order in self.chosen.items():
            for batch in self.session.walk(f"{title}, step {step}", step, order):
                yield from self._drawn(step, batch.data, batch.examples)

    def everywhere(self, title: str) -> Iterator[Row]:
        """All gradients, in every process."""
        for step, order in self.chosen.items():
            if self.shared is not None and self.shared.drawn:
                yield from self._left(f"{title}, step {step}", step, self.shared)
                continue
            for batch in self.session.walk_whole(f"{title}, step {step}", step, order):
                yield from self._drawn(step, batch.data, batch.examples)

    def _left(self, title: str, step: int, shared: SharedWalk) -> Iterator[Row]:
        """What a walk has left of every batch; of a few in a dry run, which walks over no more."""
        places = [(step, number) for number in self.numbers[step]]
        lacking = [number for _, number in places if (step, number) not in shared.drawn]
        self.session.require(
            not lacking,
            RuntimeError(
                f"{title}: the walk over the training set left no gradients for the batches "
                f"{lacking} of the sample's {len(places)}. Please report this."
            ),
        )
        left = [own for place in places for own in shared.drawn.get(place, ())]
        for own in self.session.loop(title, left, len(places) * self.session.draws):
            size = next(iter(own.gradients.values())).batch
            yield Row(own.gradients, self._roots(size, own.weights))

    def _roots(self, size: int, weights: Tensor | None) -> Tensor:
        session = self.session
        share = torch.full((size,), 1 / self.size, dtype=session.dtype).to(session.device)
        return (share if weights is None else share * weights).sqrt()

    def _drawn(self, step: int, data: object, examples: Tensor) -> Iterator[Row]:
        session = self.session
        roots = self._roots(len(examples), session.curvature_weights(examples, self.used))
        scale = self.scales.get(step, {}).get(WHOLE)
        by_block = {} if scale is None else as_matrices(session.blocks, scale[0, 0])
        for _ in session.losses.each_draw():
            found = session.fisher_gradients(data, examples, self.seed + step).blocks
            yield Row({n: scaled(g, by_block.get(n)) for n, g in found.items()}, roots)
