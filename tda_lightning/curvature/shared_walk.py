"""What one walk over the training set leaves for a fit that needs gradients of some examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tda_lightning.gradients import Gradient

_MANY = 1.25  # times a sample, that all examples are to be for it to be drawn


@dataclass(frozen=True)
class Drawn:
    """Gradients h * g of a batch by block under sampled labels.

    Attributes:
        weights: what each example counts by in the curvature, [batch]; None: 1.
    """

    gradients: dict[str, Gradient]
    weights: Tensor | None


@dataclass(frozen=True)
class SampledOrder:
    """All training examples in batches, those of two samples first.

    Attributes:
        batches: of example indices.
        fitted: numbers of the batches in the first sample.
        tested: of those in the second one: others, as far as there are any; None where all
            examples are in the first.
    """

    batches: list[list[int]]
    fitted: Sequence[int]
    tested: Sequence[int] | None

    @staticmethod
    def of(
        num_train: int, each: int, size: int, rest: int, generator: torch.Generator
    ) -> SampledOrder:
        """Two random samples of ``each`` examples in batches of ``size``, the others in batches of
        ``rest``; all examples in order where they are not many more than one sample."""
        if num_train < _MANY * each:
            batches = _split(torch.arange(num_train), size)
            return SampledOrder(batches, range(len(batches)), None)
        order = torch.randperm(num_train, generator=generator)
        both = max(0, 2 * each - num_train)  # in both samples, where there are too few others
        cuts = [0, both, each, 2 * each - both, num_train]
        parts = [
            _split(order[start:stop].sort().values, size if stop <= 2 * each else rest)
            for start, stop in zip(cuts, cuts[1:], strict=False)
        ]
        ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
        fitted, tested = range(ends[1]), [*range(ends[1], ends[2]), *range(ends[0])]
        return SampledOrder([batch for part in parts for batch in part], fitted, tested)


def _split(examples: Tensor, size: int) -> list[list[int]]:
    return [part.tolist() for part in examples.split(size)] if len(examples) else []


@dataclass(frozen=True)
class SharedWalk:
    """The orders of a walk at several checkpoints, and what it leaves of their samples.

    Attributes:
        orders: by checkpoint.
        drawn: the gradients of their samples' batches, one for each draw of the losses, by
            checkpoint and number of the batch.
    """

    orders: Mapping[int, SampledOrder]
    drawn: dict[tuple[int, int], list[Drawn]] = field(default_factory=dict)

    def keep(self, step: int, number: int, drawn: Sequence[Drawn]) -> None:
        """Take the gradients of a batch, if it is in a sample."""
        order = self.orders[step]
        if (step, number) in self.drawn:
            return
        if number in order.fitted or number in (order.tested or ()):
            self.drawn[step, number] = list(drawn)
