"""The standard losses that user code calls, and the weight it gives to each element.

A torch function mode sees ``F.cross_entropy`` and its like. In attribution ``step_graph.py`` runs
their elements; in training (:class:`LossObserver`) the call is made exactly as the user's code
makes it, and its elements and their weights are worked out afterwards:
d total / d element = (d total / d value) (d value / d element).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode

from tda_lightning.tasks.standard_losses import (
    LogisticLoss,
    SoftmaxLoss,
    SquaredLoss,
    StandardLoss,
    check_labels,
)

LossFunction: TypeAlias = Callable[..., Tensor]
Given: TypeAlias = Mapping[str, Any]  # arguments of a call by name


@dataclass(frozen=True)
class LossCall:
    """The elements of one call.

    The sum of ``mass`` is what ``reduction="mean"`` divides by where that depends on the labels
    (class weights, ignored targets), [elements]; None where it is the number of elements.
    """

    loss: StandardLoss
    mass: Tensor | None
    reduction: str


@dataclass(frozen=True)
class WeightedLoss:
    """A standard loss and d total / d element, detached, in the shape of ``loss.values``;
    ``number`` is its place among the calls."""

    loss: StandardLoss
    weights: Tensor
    number: int
    example: int | None = None

    def by_position(self, batch: int) -> Tensor:
        """Weight x loss of each example's elements, [batch, positions]."""
        return (self.weights * self.loss.values).reshape(batch, -1)

    def scale(self, batch: int) -> Tensor:
        """sqrt(weight x curvature) of each element, [batch, positions]."""
        return (self.weights.flatten() * self.loss.curvature).sqrt().view(batch, -1)

    def times(self, factors: Tensor) -> WeightedLoss:
        """The loss with each example's elements times its factor, [batch]."""
        if self.example is not None:
            factors = factors[self.example : self.example + 1]
        weights = self.weights.reshape(len(factors), -1) * factors.to(self.weights)[:, None]
        return replace(self, weights=weights.reshape(self.weights.shape))

    @property
    def outputs(self) -> Tensor:
        """What the loss is of."""
        return self.loss.outputs

    def sampled(self, batch: int, stream: int) -> Tensor:
        """A random loss of each example whose gradient has the loss's matrix as its second
        moment, [batch]."""
        return self.loss.sampled(self.scale(batch), stream).sum(1)

    def factors(self, batch: int) -> Iterator[Tensor]:
        """Losses [batch] whose outer products of gradients sum to the matrix."""
        for factor in self.loss.factors(self.scale(batch)):
            yield from factor.unbind(1)

    def curved(self, tangents: Tensor) -> Tensor:
        """The second derivative of the sum of weight x loss in the outputs, times ``tangents``,
        [..., *outputs]."""
        scale = self.weights.flatten() * self.loss.curvature
        form = self.loss.curved(tangents)
        return form * scale.view(scale.shape + (1,) * (self.loss.outputs.dim() - 1))

    def fits(self, batch: int) -> bool:
        """Whether the elements are those of ``batch`` examples, batch axis leading."""
        leading = self.loss.values.shape[0] if self.loss.values.dim() else 1
        return leading % batch == 0


def given_by_name(
    func: LossFunction, args: Iterable[object], kwargs: Mapping[str, object]
) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in."""
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def reduction_of(given: dict[str, Any]) -> str:
    """How a loss reduces, by old arguments or new; ``given`` then asks for its elements."""
    reduction: str = given["reduction"]
    if given.get("size_average") is not None or given.get("reduce") is not None:
        reduction = _reduction.legacy_get_string(given["size_average"], given["reduce"], False)
    given.update({name: None for name in ("size_average", "reduce") if name in given})
    given["reduction"] = "none"
    return reduction


def inside_transform() -> bool:
    """Whether a transform of ``torch.func`` is running, where values cannot be read."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class _LossMode(TorchFunctionMode, ABC):
    """Sees every call of a standard loss while active."""

    def __torch_function__(
        self,
        func: LossFunction,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func not in READERS:
            return func(*args, **(kwargs or {}))
        given = given_by_name(func, args, kwargs or {})
        reduction = reduction_of(given)
        return self.call(func, given, reduction)

    @abstractmethod
    def call(self, func: LossFunction, given: Given, reduction: str) -> Tensor:
        """The value of the call, with ``reduction="none"`` among the ``given`` arguments."""


@dataclass(frozen=True)
class ObservedLoss:
    """One call in training: its arguments, and the value that it gave."""

    func: LossFunction
    given: Given
    reduction: str
    value: Tensor

    @property
    def arguments(self) -> list[str]:
        """Names of the arguments that come from the model: mean squared error does not care which
        side they are on."""
        names = ("input", "target")
        return [n for n in names if isinstance(x := self.given[n], Tensor) and x.requires_grad]

    def weighted(
        self, derivative: Tensor, leaves: Mapping[str, Tensor], number: int
    ) -> WeightedLoss:
        """The call's elements and their weights.

        Args:
            derivative: d total / d value.
            leaves: what stands in for some of the arguments.
            number: place among the calls.
        """
        given = {**self.given, **leaves}
        loss, mass = READERS[self.func](lambda: self.func(**given), given)
        weights = derivative.to(loss.values.detach())
        if self.reduction == "mean":
            weights = weights / (loss.values.numel() if mass is None else mass.sum().detach())
        return WeightedLoss(loss, weights.expand(loss.values.shape), number)


class LossObserver(_LossMode):
    """Notes the standard losses that are called while active, with a graph behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[ObservedLoss] = []

    def call(self, func: LossFunction, given: Given, reduction: str) -> Tensor:
        value = func(**{**given, "reduction": reduction})
        if value.requires_grad:
            self.losses.append(ObservedLoss(func, given, reduction, value))
        return value


# Each reader checks its arguments, and then calls ``evaluate`` for the loss of each element.
# It gives the loss and its mass (see LossCall).
_Read: TypeAlias = tuple[StandardLoss, Tensor | None]


def _read_cross_entropy(evaluate: Callable[[], Tensor], given: Given) -> _Read:
    logits, target, weight = given["input"], given["target"], given["weight"]
    smoothing = given.get("label_smoothing", 0.0)
    classes = logits.shape[1] if logits.dim() > 1 else logits.shape[0]
    flat = (logits.movedim(1, -1) if logits.dim() > 1 else logits).reshape(-1, classes)
    if target.is_floating_point():  # probabilities; torch divides by the number of positions
        target = (target.movedim(1, -1) if target.dim() > 1 else target).reshape(-1, classes)
        target = target * (1 - smoothing) + smoothing / classes
        curvature = (target if weight is None else target * weight).sum(-1).to(flat.dtype)
        return SoftmaxLoss(evaluate(), flat, curvature.detach()), None
    ignore_index = given["ignore_index"]
    check_labels(target, classes, ignore_index)
    labels = target.flatten()
    counted = labels != ignore_index
    curvature = mass = counted.to(flat.dtype)
    if weight is not None:
        mass = weight[labels.where(counted, 0)] * counted
        curvature = (1 - smoothing) * mass + smoothing * weight.mean() * counted
    hard = labels.where(counted, 0) if smoothing == 0 else None
    return SoftmaxLoss(evaluate(), flat, curvature.detach(), hard), mass


def _read_mse(evaluate: Callable[[], Tensor], given: Given) -> _Read:
    outputs, target = given["input"], given["target"]
    difference = outputs - target
    if difference.shape not in (outputs.shape, target.shape):
        raise ValueError(
            f"mse_loss got outputs of shape {list(outputs.shape)} and targets of shape "
            f"{list(target.shape)}: they broadcast to {list(difference.shape)}, so that each "
            "example is compared with the targets of others. Give both the same shape."
        )
    values = evaluate()
    weight = given.get("weight")
    curvature = torch.ones_like(values) if weight is None else weight.expand_as(values)
    difference = difference.expand_as(values).flatten()
    mass = None if weight is None else weight
    return SquaredLoss(values, difference, curvature.detach().flatten(), outputs), mass


def _read_binary_cross_entropy(evaluate: Callable[[], Tensor], given: Given) -> _Read:
    logits, target = given["input"], given["target"]
    values = evaluate()
    curvature = torch.ones_like(values)
    if given["pos_weight"] is not None:
        curvature = given["pos_weight"] * target + (1 - target)
    if given["weight"] is not None:
        curvature = curvature * given["weight"]
    curvature = curvature.detach().to(values.dtype).expand_as(values).flatten()
    bits = target.detach().to(values.dtype).expand_as(values).flatten()
    hard = bits if inside_transform() or bool(((bits == 0) | (bits == 1)).all()) else None
    return LogisticLoss(values, logits.flatten(), curvature, hard), None


# nll_loss is read as cross entropy: log-probabilities are logits of themselves, since
# log_softmax(log_softmax(z)) = log_softmax(z).
READERS: dict[LossFunction, Callable[[Callable[[], Tensor], Given], _Read]] = {
    F.cross_entropy: _read_cross_entropy,
    F.nll_loss: _read_cross_entropy,
    F.mse_loss: _read_mse,
    F.binary_cross_entropy_with_logits: _read_binary_cross_entropy,
}


def by_position_of(losses: Sequence[WeightedLoss], batch: int) -> Tensor:
    """Weight x loss of each example's single terms, summed over losses: [batch, position].

    Raises:
        ValueError: there is no standard loss, or they have different numbers of terms.
    """
    fitting = [loss for loss in losses if loss.fits(batch)]
    terms = [loss.by_position(batch) for loss in fitting]
    lengths = sorted({term.shape[1] for term in terms})
    if len(lengths) != 1 or len(fitting) < len(losses):
        raise ValueError(
            "The terms of single positions are not known: expected standard losses of "
            "torch.nn.functional with the same number of terms for each example, got "
            f"{lengths}. Score whole examples (by_token=None, token_weights=False)."
        )
    return torch.stack(terms).sum(0)
