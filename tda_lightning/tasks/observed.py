"""The standard losses that a training step calls, watched without changing them.

``interception.py`` replaces a loss by its elements; here the call is made exactly as the user's
code makes it, and its elements and their weights are worked out afterwards:
w_e = (d total / d value) (d value / d element).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode

from tda_lightning.tasks.interception import READERS, Call, WeightedLoss


@dataclass(frozen=True)
class ObservedLoss:
    """One call: its arguments, and the value that it gave."""

    func: Callable[..., Tensor]
    given: Mapping[str, Any]
    reduction: str
    value: Tensor

    @property
    def arguments(self) -> list[str]:
        """Names of the arguments that come from the model: mean squared error does not care which
        side they are on."""
        names = ("input", "target")
        return [n for n in names if isinstance(x := self.given[n], Tensor) and x.requires_grad]


class LossObserver(TorchFunctionMode):
    """Notes the standard losses that are called while active, with a graph behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[ObservedLoss] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        value = func(*args, **(kwargs or {}))
        if func in READERS and value.requires_grad:
            bound = inspect.signature(func).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            given = bound.arguments
            reduction = given["reduction"]
            if given["size_average"] is not None or given["reduce"] is not None:
                reduction = _reduction.legacy_get_string(
                    given["size_average"], given["reduce"], False
                )
            given.update(size_average=None, reduce=None, reduction="none")
            self.losses.append(ObservedLoss(func, given, reduction, value))
        return value


def sampled_output_gradients(
    total: Tensor, losses: Sequence[ObservedLoss], batch: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Output gradients of sampled labels, for the loss of a batch as it is optimised.

    Carried back to the parameters and split by example, their second moment, averaged over the
    batch, is the Gauss-Newton matrix of ``total`` (docs/methods.md, "Units"). Inside
    :func:`~tda_lightning.tasks.seeded_examples` they depend on the seed and the example alone.

    Args:
        total: the loss of the batch, a scalar with its graph, which is kept.
        losses: the standard losses behind it.
        batch: examples in the batch.

    Returns:
        The outputs that losses were taken of, and a gradient for each.

    Raises:
        ValueError: a loss enters with a negative weight, or is not laid out by example.
    """
    derivatives = torch.autograd.grad(
        total.sum(), [loss.value for loss in losses], retain_graph=True, allow_unused=True
    )
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for stream, (loss, derivative) in enumerate(zip(losses, derivatives, strict=True)):
        if derivative is None:
            continue
        leaves = {name: loss.given[name].detach().requires_grad_() for name in loss.arguments}
        with torch.enable_grad():
            call = _read(loss, leaves)
            weights = _element_weights(loss, call, derivative) * batch
            item = WeightedLoss(call.loss, weights, stream)
            _require_usable(item, batch)
            sampled = item.loss.sampled(item.scale(batch), stream).sum()
            gradients += torch.autograd.grad(sampled, list(leaves.values()))
        outputs += [loss.given[name] for name in leaves]
    return outputs, gradients


def _read(loss: ObservedLoss, leaves: Mapping[str, Tensor]) -> Call:
    given = {**loss.given, **leaves}
    return READERS[loss.func](lambda: loss.func(**given), given, loss.reduction)


def _element_weights(loss: ObservedLoss, call: Call, derivative: Tensor) -> Tensor:
    """d total / d element, in the shape of the elements."""
    values = call.loss.values.detach()
    if loss.reduction == "none":
        return derivative.to(values)
    mass: Any = 1
    if loss.reduction == "mean":
        mass = values.numel() if call.mass is None else call.mass
    return (derivative.to(values) / mass).expand(values.shape)


def _require_usable(item: WeightedLoss, batch: int) -> None:
    if not item.fits(batch):
        raise ValueError(
            f"A {item.loss.kind} loss in training_step has shape {list(item.loss.values.shape)} "
            f"for {batch} examples: expected the batch axis first, so that labels can be sampled "
            "for each. Record with fisher='empirical', or with curvature=None."
        )
    if bool((item.weights < 0).any()):
        raise ValueError(
            f"training_step subtracts a {item.loss.kind} loss: there is no Gauss-Newton matrix of "
            "it. Record with fisher='empirical', or with curvature=None."
        )
