"""The losses whose Gauss-Newton matrix is known: softmax, squared error, logistic.

Each holds the loss of every element (a class decision, a number, a bit) as the user's code asked
for it, class weights included, and its curvature: the Hessian of the element's loss in the outputs
is ``curvature`` times a fixed form that depends on the outputs alone. Elements are flattened with
the batch axis leading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tda_lightning.tasks.noise import RANDOM_BITS, random_integers, random_signs


@dataclass(frozen=True)
class StandardLoss:
    """Element losses of one call.

    Attributes:
        values: loss of each element as the call returns it with ``reduction="none"``. The tensor
            that the rest of the user's computation hangs on: derivatives are taken to it.
        outputs: [elements], or logits [elements, classes].
        curvature: factor of the Hessian, [elements]; 0 for ignored elements.
    """

    kind: ClassVar[str]
    values: Tensor
    outputs: Tensor
    curvature: Tensor

    def sampled(self, scale: Tensor, stream: int) -> Tensor:
        """A loss whose gradient has second moment scale^2 x Hessian per element.

        Args:
            scale: [batch, positions]; batch x positions elements.
            stream: number of the loss within its task.

        Returns:
            [batch, positions].
        """
        raise NotImplementedError

    def factors(self, scale: Tensor) -> Iterator[Tensor]:
        """Losses [batch, positions] whose outer products of gradients sum to scale^2 x Hessian."""
        raise NotImplementedError

    def describe(self, batch: int) -> list[str] | None:
        """What the model says of each example, in a few words; None when that would be long."""
        raise NotImplementedError


@dataclass(frozen=True)
class SoftmaxLoss(StandardLoss):
    """Cross entropy: the Hessian in the logits is curvature x (diag(p) - p p^T)."""

    kind = "softmax"

    def sampled(self, scale: Tensor, stream: int) -> Tensor:
        labels = self._sample(*scale.shape, stream)
        losses = F.cross_entropy(_full_precision(self.outputs), labels, reduction="none")
        return scale * losses.view(scale.shape)

    def factors(self, scale: Tensor) -> Iterator[Tensor]:
        """One for each class c: sqrt(p_c) CE(c)."""
        log_probabilities = F.log_softmax(_full_precision(self.outputs), dim=-1)
        roots = (log_probabilities.detach() / 2).exp()
        for index in range(self.outputs.shape[-1]):
            losses = -roots[:, index] * log_probabilities[:, index]
            yield scale * losses.view(scale.shape)

    def describe(self, batch: int) -> list[str] | None:
        if len(self.outputs) == batch:
            return describe_classes(self.outputs)
        return None

    def _sample(self, batch: int, positions: int, stream: int) -> Tensor:
        """Labels from the model by inverse distribution function, [elements].

        The distribution function is counted in units of 2^-30: integer sums do not depend on the
        order of addition, and a class of (nearly) no probability is never drawn.
        """
        logits = _full_precision(self.outputs.detach())
        counts = (logits.softmax(-1) * (1 << 30)).round().to(torch.int32)
        cumulative = counts.cumsum(-1, dtype=torch.int32)
        total = cumulative[:, -1].long()
        random = random_integers(batch, positions, stream, logits.device).flatten()
        threshold = (random * total) >> RANDOM_BITS
        return (cumulative <= threshold[:, None]).sum(-1)


@dataclass(frozen=True)
class SquaredLoss(StandardLoss):
    """Squared error: the second derivative is 2 x curvature. ``outputs`` holds output - target."""

    kind = "squared"
    predicted: Tensor

    def sampled(self, scale: Tensor, stream: int) -> Tensor:
        """Labels at o +- sqrt(1/2), the variance that METHODS asks for of (o - y)^2.

        Two-point rather than normal labels: their second moment, which is all that curvature uses,
        is the same, and with one output the product of gradients is the Gauss-Newton matrix
        itself, without any noise.
        """
        signs = random_signs(*scale.shape, stream, like=self.outputs)
        return scale * 2**0.5 * signs * self.outputs.view(scale.shape)

    def factors(self, scale: Tensor) -> Iterator[Tensor]:
        yield scale * 2**0.5 * self.outputs.view(scale.shape)

    def describe(self, batch: int) -> list[str] | None:
        return describe_numbers(self.predicted.reshape(batch, -1))


@dataclass(frozen=True)
class LogisticLoss(StandardLoss):
    """Binary cross entropy of logits: the second derivative is curvature x p (1 - p)."""

    kind = "logistic"

    def sampled(self, scale: Tensor, stream: int) -> Tensor:
        """Two-point noise of the Bernoulli labels' variance p (1 - p); see SquaredLoss."""
        signs = random_signs(*scale.shape, stream, like=self.outputs)
        return signs * next(self.factors(scale))

    def factors(self, scale: Tensor) -> Iterator[Tensor]:
        # p (1 - p) as a product of sigmoids keeps the digits that 1 - p loses near p = 1.
        logits = self.outputs.detach()
        roots = (logits.sigmoid() * (-logits).sigmoid()).sqrt()
        yield scale * (roots * self.outputs).view(scale.shape)

    def describe(self, batch: int) -> list[str] | None:
        numbers = describe_numbers(self.outputs.sigmoid().reshape(batch, -1))
        return numbers and [f"probability {number}" for number in numbers]


def describe_classes(logits: Tensor) -> list[str]:
    """The likeliest class and its probability for each row of logits [batch, classes]."""
    best, classes = _full_precision(logits.detach()).softmax(-1).max(-1)
    pairs = zip(classes.tolist(), best.tolist(), strict=True)
    return [f"class {index} ({probability:.1%})" for index, probability in pairs]


def describe_numbers(values: Tensor, limit: int = 8) -> list[str] | None:
    """The row's values [batch, values]; None beyond ``limit`` of them."""
    if values.shape[1] > limit:
        return None
    return [", ".join(f"{value:.4g}" for value in row) for row in values.detach().tolist()]


def _full_precision(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def check_labels(labels: Tensor, classes: int, ignore_index: int = -100) -> None:
    """Refuse labels outside 0 .. classes - 1.

    Nothing is checked where values cannot be read, inside a ``torch.func`` transform.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(labels):
        return
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if wrong.any():
        position = wrong.nonzero()[0].tolist()
        where = position[0] if len(position) == 1 else tuple(position)
        raise ValueError(
            f"Expected labels in 0 .. {classes - 1} for a model with {classes} outputs, got "
            f"{int(labels[tuple(position)])} at position {where} of the batch. Check the labels, "
            f"the number of outputs, or ignore_index (now {ignore_index})."
        )
