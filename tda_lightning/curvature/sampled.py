"""Gradients under sampled labels of some training examples, whose second moment stands for the
curvature of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tda_lightning.curvature.fit import WHOLE, Scales
from tda_lightning.curvature.products import as_matrices
from tda_lightning.gradients import Gradient, Joined, scaled
from tda_lightning.session.session import Session, Span


@dataclass(frozen=True)
class Drawn:
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
        steps: the checkpoints.
        orders: for each, batches of example indices.
        scales: h of all parameters, [1, 1, parameters], by checkpoint and unit; a missing one
            is 1.
        seed: of the sampled labels.
        used: the steps whose use of examples weighs them; None: evenly.
    """

    session: Session
    steps: Sequence[int]
    orders: Sequence[Sequence[Sequence[int]]]
    scales: Scales
    seed: int
    used: Span | None

    @property
    def size(self) -> int:
        """Gradients in all."""
        return sum(len(batch) for order in self.orders for batch in order) * self.session.draws

    @property
    def batches(self) -> int:
        """In which they come."""
        return sum(map(len, self.orders)) * self.session.draws

    @property
    def held(self) -> int:
        """Scalars that they take in memory, factored."""
        return self.size * self.session.engine.held

    def walk(self, title: str) -> Iterator[Drawn]:
        """This process's share of the gradients, batch by batch."""
        for step, order in zip(self.steps, self.orders, strict=True):
            for batch in self.session.walk(f"{title}, step {step}", step, order):
                yield from self._drawn(step, batch.data, batch.examples)

    def everywhere(self, title: str) -> Iterator[Drawn]:
        """All gradients, in every process."""
        for step, order in zip(self.steps, self.orders, strict=True):
            for batch in self.session.walk_whole(f"{title}, step {step}", step, order):
                yield from self._drawn(step, batch.data, batch.examples)

    def _drawn(self, step: int, data: object, examples: Tensor) -> Iterator[Drawn]:
        session = self.session
        weights = session.curvature_weights(examples, self.used)
        share = torch.full((len(examples),), 1 / self.size, dtype=session.dtype)
        share = share.to(session.device)
        roots = (share if weights is None else share * weights).sqrt()
        scale = self.scales.get(step, {}).get(WHOLE)
        by_block = {} if scale is None else as_matrices(session.blocks, scale[0, 0])
        for _ in session.losses.each_draw():
            found = session.fisher_gradients(data, examples, self.seed + step).blocks
            yield Drawn({n: scaled(g, by_block.get(n)) for n, g in found.items()}, roots)
