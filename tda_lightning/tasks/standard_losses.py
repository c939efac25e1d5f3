"""The losses whose Gauss-Newton matrix is known: softmax, squared error, logistic.

Each holds the loss of every element (a class decision, a number, a bit) as the user's code asked
for it, class weights included, and its curvature: the Hessian of the element's loss in the outputs
is ``curvature`` times a form that depends on the outputs alone. Elements are flattened with
the batch axis leading.

Labels drawn from the model have output gradients whose covariance is that Hessian. We draw the
gradients instead, as a square root of the Hessian times random signs: all that curvature uses is
the covariance, and this noise has it too, at a much smaller variance of the estimate. A confident
model draws a label other than its own once in a thousand examples, and the estimate then depends on
those few; signs weigh every example the same (on digits at 100% training accuracy the error of the
estimated matrix is 0.3 instead of 2.7). With one output, squared errors have no noise at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from tda_lightning.runtime import conditions
from tda_lightning.tasks.example_seeds import random_signs


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
        """A random loss whose gradient has second moment scale^2 x Hessian for each element.

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

    def curved(self, tangents: Tensor) -> Tensor:
        """The Hessian of the element's loss in the outputs without its factor ``curvature``, times
        ``tangents`` [..., *outputs]."""
        raise NotImplementedError

    def describe(self, batch: int) -> list[str] | None:
        """What the model says of each example, in a few words; None when that would be long."""
        raise NotImplementedError


@dataclass(frozen=True)
class SoftmaxLoss(StandardLoss):
    r"""Cross entropy: the Hessian in the logits is curvature x (diag(p) - p p^T) = S S^T with

    .. math::
        S = diag(\sqrt p) - p \sqrt p^\top
    """

    kind = "softmax"
    labels: Tensor | None = None  # [elements]; None where they are probabilities, or smoothed

    def correct_margins(self) -> Tensor | None:
        """log p / (1 - p) with p the probability of the label, [elements]; None without labels."""
        if self.labels is None:
            return None
        logits = _full_precision(self.outputs)
        labels = self.labels[:, None]
        correct = torch.arange(logits.shape[1], device=logits.device) == labels
        # From the logits: 1 - p has lost its digits where the model is sure.
        others = logits.masked_fill(correct, -torch.inf).logsumexp(1)
        return logits.gather(1, labels).squeeze(1) - others

    def sampled(self, scale: Tensor, stream: int) -> Tensor:
        """S z . logits with random signs z, a linear loss."""
        batch, positions = scale.shape
        logits = _full_precision(self.outputs)
        probabilities = logits.detach().softmax(-1)
        shape = batch, positions, logits.shape[-1]
        signs = random_signs(*shape, stream, logits.device).view(logits.shape)
        direction = probabilities.sqrt().mul_(signs)
        sums = direction.sum(-1, keepdim=True)
        direction = direction.addcmul_(probabilities, sums, value=-1)
        return scale * _Linear.apply(direction, logits).view(scale.shape)

    def factors(self, scale: Tensor) -> Iterator[Tensor]:
        """One for each class, with a column of S for S z."""
        logits = _full_precision(self.outputs)
        probabilities = logits.detach().softmax(-1)
        # Masked classes have a logit of -inf, and 0 x -inf would be NaN.
        logits = logits.where(probabilities > 0, 0)
        mean = (probabilities * logits).sum(-1)
        roots = probabilities.sqrt()
        for index in range(logits.shape[-1]):
            yield scale * (roots[:, index] * (logits[:, index] - mean)).view(scale.shape)

    def curved(self, tangents: Tensor) -> Tensor:
        probabilities = _full_precision(self.outputs.detach()).softmax(-1)
        # Masked classes have a logit of -inf, whose tangent may be NaN.
        tangents = tangents.to(probabilities).where(probabilities > 0, 0)
        mean = (probabilities * tangents).sum(-1, keepdim=True)
        return (probabilities * (tangents - mean)).to(self.outputs)

    def describe(self, batch: int) -> list[str] | None:
        return describe_classes(self.outputs) if len(self.outputs) == batch else None


class _Linear(torch.autograd.Function):
    """sum_c direction_c logits_c of each row, in which a masked class (a logit of -inf, and a
    direction of 0) counts for nothing. By plain autograd, leaving those classes out takes longer
    than all the rest: vocabularies are wide."""

    generate_vmap_rule = True

    @staticmethod
    def forward(direction: Tensor, logits: Tensor) -> Tensor:
        finite = logits.clamp(min=torch.finfo(logits.dtype).min)
        return finite.mul_(direction).sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (direction,) = ctx.saved_tensors
        return None, gradient[..., None] * direction


@dataclass(frozen=True)
class SquaredLoss(StandardLoss):
    """Squared error: the second derivative is 2 x curvature. ``outputs`` holds output - target."""

    kind = "squared"
    predicted: Tensor

    def sampled(self, scale: Tensor, stream: int) -> Tensor:
        """Labels at o +- sqrt(1/2): the variance for (o - y)^2 (docs/methods.md, "Units")."""
        return _random_signs(scale, stream) * next(self.factors(scale))

    def factors(self, scale: Tensor) -> Iterator[Tensor]:
        yield scale * 2**0.5 * self.outputs.view(scale.shape)

    def curved(self, tangents: Tensor) -> Tensor:
        return 2 * tangents

    def describe(self, batch: int) -> list[str] | None:
        return describe_numbers(self.predicted.reshape(batch, -1))


@dataclass(frozen=True)
class LogisticLoss(StandardLoss):
    """Binary cross entropy of logits: the second derivative is curvature x p (1 - p)."""

    kind = "logistic"
    labels: Tensor | None = None  # [elements], 0 or 1; None where they may be others

    def correct_margins(self) -> Tensor | None:
        """log p / (1 - p) with p the probability of the label, [elements]; None without labels."""
        return None if self.labels is None else (2 * self.labels - 1) * self.outputs

    def sampled(self, scale: Tensor, stream: int) -> Tensor:
        return _random_signs(scale, stream) * next(self.factors(scale))

    def factors(self, scale: Tensor) -> Iterator[Tensor]:
        yield scale * (self._variance().sqrt() * self.outputs).view(scale.shape)

    def curved(self, tangents: Tensor) -> Tensor:
        return self._variance() * tangents

    def _variance(self) -> Tensor:
        # p (1 - p) as a product of sigmoids keeps the digits that 1 - p loses near p = 1.
        logits = self.outputs.detach()
        return logits.sigmoid() * (-logits).sigmoid()

    def describe(self, batch: int) -> list[str] | None:
        numbers = describe_numbers(self.outputs.sigmoid().reshape(batch, -1))
        return numbers and [f"probability {number}" for number in numbers]


def _random_signs(scale: Tensor, stream: int) -> Tensor:
    return random_signs(*scale.shape, 1, stream, scale.device).squeeze(-1)  # type: ignore[call-arg]


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

    def error() -> NoReturn:
        position = wrong.nonzero()[0].tolist()
        where = position[0] if len(position) == 1 else tuple(position)
        raise ValueError(
            f"Expected labels in 0 .. {classes - 1} for a model with {classes} outputs, got "
            f"{int(labels[tuple(position)])} at position {where} of the batch. Check the labels, "
            f"the number of outputs, or ignore_index (now {ignore_index})."
        )

    conditions.require(~wrong.any(), error)
