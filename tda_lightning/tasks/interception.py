"""Find the standard losses that user code calls, and the weight it gives to each element.

A torch function mode replaces ``F.cross_entropy`` and its like by the same loss per element,
reduced afterwards as asked. Whatever the code then does with it linearly (factors, sums, masks,
its own reductions), d total / d element is the weight of each element exactly as trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Call:
    """One intercepted call.

    ``mass`` is what ``reduction="mean"`` divides by where that depends on the labels (class
    weights, ignored targets), a scalar tensor; None where it is the number of elements.
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

    def per_example(self, batch: int) -> Tensor:
        """Sum of weight x loss over each example's elements, [batch]."""
        return (self.weights * self.loss.values).reshape(batch, -1).sum(1)

    def scale(self, batch: int) -> Tensor:
        """sqrt(weight x curvature) of each element, [batch, positions]."""
        return (self.weights.flatten() * self.loss.curvature).sqrt().view(batch, -1)

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


def by_term(found: Sequence[WeightedLoss], batch: int) -> Tensor:
    """Weight x loss of each example's single terms, summed over losses: [batch, position].

    Raises:
        ValueError: there is no standard loss, or the losses have different numbers of terms.
    """
    parts = [(item.weights * item.loss.values).reshape(batch, -1) for item in found]
    lengths = sorted({part.shape[1] for part in parts})
    if len(lengths) != 1:
        raise ValueError(
            "The terms of single positions are not known: expected standard losses of "
            f"torch.nn.functional with the same number of terms for each example, got {lengths}. "
            "Attribute to whole examples (token_weights=False)."
        )
    return torch.stack(parts).sum(0)


def intercept(
    run: Callable[[], Tensor], masses: Sequence[Tensor | None] = (), batch: int = 1
) -> tuple[Tensor, list[WeightedLoss], list[Call]]:
    """Run ``run() -> total`` and find the standard losses in it.

    Args:
        masses: what "mean" divides by in each call, per example of the batch, where this is to
            be the same for all batches (None: as the call has it).
        batch: examples of the batch, for ``masses``.

    Returns:
        The total (a scalar, or losses whose sum is differentiated), the losses it depends on, and
        all calls in order.
    """
    mode = _StandardLosses(masses, batch)
    with torch.enable_grad():
        with mode:
            total = run()
        calls = mode.calls
        if not calls:
            return total, [], calls
        weights: Sequence[Tensor | None]
        if total.requires_grad:
            weights = _derivatives(total, calls)
        else:
            weights = _derivatives_in_transform(run, mode)
    found = [
        WeightedLoss(call.loss, weight.detach(), number)
        for number, (call, weight) in enumerate(zip(calls, weights, strict=True))
        if weight is not None
    ]
    return total, found, calls


def standard_outputs(run: Callable[[], Tensor]) -> list[Tensor]:
    """The outputs that the standard losses in ``run()`` are of, by call: ``StandardLoss.outputs``
    without the weights, which take a derivative of their own."""
    mode = _StandardLosses((), 1)
    with mode:
        run()
    return [call.loss.outputs for call in mode.calls]


def _derivatives(total: Tensor, calls: Sequence[Call]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        total.sum(), [call.loss.values for call in calls], retain_graph=True, allow_unused=True
    )


def _derivatives_in_transform(
    run: Callable[[], Tensor], mode: _StandardLosses
) -> Sequence[Tensor | None]:
    """Weights under ``torch.func.vmap`` alone, where no tensor may be made to require gradients:
    a second run inside ``torch.func.grad`` of a zero that is added to every loss."""
    if not _inside_transform():
        return [None] * len(mode.calls)

    def probe(zero: Tensor) -> tuple[Tensor, list[Tensor]]:
        again = _StandardLosses(mode.masses, mode.batch, zero)
        with again:
            total = run()
        weights = _derivatives(total, again.calls)
        return zero, [
            torch.zeros_like(call.loss.values) if weight is None else weight
            for call, weight in zip(again.calls, weights, strict=True)
        ]

    zero = torch.zeros((), device=mode.calls[0].loss.values.device)
    _, weights = torch.func.grad(probe, has_aux=True)(zero)
    return weights


def _inside_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


class _StandardLosses(TorchFunctionMode):
    """Collects the calls. ``zero`` is added to every loss to connect it (see above)."""

    def __init__(
        self, masses: Sequence[Tensor | None], batch: int, zero: Tensor | None = None
    ) -> None:
        super().__init__()
        self.masses, self.batch, self.zero = masses, batch, zero
        self.calls: list[Call] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in READERS:
            return func(*args, **(kwargs or {}))
        bound = inspect.signature(func).bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        given = bound.arguments
        reduction = given["reduction"]
        if given["size_average"] is not None or given["reduce"] is not None:
            reduction = _reduction.legacy_get_string(given["size_average"], given["reduce"], False)
        given.update(size_average=None, reduce=None, reduction="none")
        call = READERS[func](lambda: self._connect(func(**given)), given, reduction)
        self.calls.append(call)
        return self._reduce(call)

    def _connect(self, values: Tensor) -> Tensor:
        if self.zero is not None:
            return values + self.zero.to(values.dtype)
        if not values.requires_grad and not _inside_transform():
            # No graph (gradients switched off): a leaf is enough to find the weights.
            return values.detach().requires_grad_()
        return values

    def _reduce(self, call: Call) -> Tensor:
        values = call.loss.values
        if call.reduction == "none":
            return values.clone()  # the caller may change its copy in place
        if call.reduction == "sum":
            return values.sum()
        number = len(self.calls) - 1
        fixed = self.masses[number] if number < len(self.masses) else None
        if fixed is not None:
            return values.sum() / (fixed.to(values) * self.batch)
        return values.sum() / call.mass if call.mass is not None else values.mean()


# Each reader checks its arguments, and then calls ``evaluate`` for the loss of each element.
def _read_cross_entropy(
    evaluate: Callable[[], Tensor], given: Mapping[str, Any], reduction: str
) -> Call:
    logits, target, weight = given["input"], given["target"], given["weight"]
    smoothing = given.get("label_smoothing", 0.0)
    classes = logits.shape[1] if logits.dim() > 1 else logits.shape[0]
    flat = (logits.movedim(1, -1) if logits.dim() > 1 else logits).reshape(-1, classes)
    if target.is_floating_point():  # probabilities; torch divides by the number of positions
        target = (target.movedim(1, -1) if target.dim() > 1 else target).reshape(-1, classes)
        target = target * (1 - smoothing) + smoothing / classes
        curvature = (target if weight is None else target * weight).sum(-1).to(flat.dtype)
        return Call(SoftmaxLoss(evaluate(), flat, curvature.detach()), None, reduction)
    ignore_index = given["ignore_index"]
    check_labels(target, classes, ignore_index)
    labels = target.flatten()
    kept = labels != ignore_index
    curvature = mass = kept.to(flat.dtype)
    if weight is not None:
        mass = weight[labels.where(kept, 0)] * kept
        curvature = (1 - smoothing) * mass + smoothing * weight.mean() * kept
    loss = SoftmaxLoss(evaluate(), flat, curvature.detach())
    return Call(loss, mass.sum().detach(), reduction)


def _read_mse(evaluate: Callable[[], Tensor], given: Mapping[str, Any], reduction: str) -> Call:
    outputs, target = given["input"], given["target"]
    shape = torch.broadcast_shapes(outputs.shape, target.shape)
    if shape not in (outputs.shape, target.shape):
        raise ValueError(
            f"mse_loss got outputs of shape {list(outputs.shape)} and targets of shape "
            f"{list(target.shape)}: they broadcast to {list(shape)}, so that each example is "
            "compared with the targets of others. Give both the same shape."
        )
    values = evaluate()
    weight = given.get("weight")
    curvature = torch.ones_like(values) if weight is None else weight.expand_as(values)
    difference = (outputs - target).expand_as(values).flatten()
    mass = None if weight is None else weight.sum().detach()
    loss = SquaredLoss(values, difference, curvature.detach().flatten(), outputs)
    return Call(loss, mass, reduction)


def _read_binary_cross_entropy(
    evaluate: Callable[[], Tensor], given: Mapping[str, Any], reduction: str
) -> Call:
    logits, target = given["input"], given["target"]
    values = evaluate()
    curvature = torch.ones_like(values)
    if given["pos_weight"] is not None:
        curvature = given["pos_weight"] * target + (1 - target)
    if given["weight"] is not None:
        curvature = curvature * given["weight"]
    curvature = curvature.detach().to(values.dtype).expand_as(values).flatten()
    return Call(LogisticLoss(values, logits.flatten(), curvature), None, reduction)


# nll_loss is read as cross entropy: log-probabilities are logits of themselves, since
# log_softmax(log_softmax(z)) = log_softmax(z).
_Reader = Callable[[Callable[[], Tensor], Mapping[str, Any], str], Call]
READERS: dict[Callable[..., Tensor], _Reader] = {
    F.cross_entropy: _read_cross_entropy,
    F.nll_loss: _read_cross_entropy,
    F.mse_loss: _read_mse,
    F.binary_cross_entropy_with_logits: _read_binary_cross_entropy,
}
