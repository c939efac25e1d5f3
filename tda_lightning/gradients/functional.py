"""Per-example gradients through ``torch.func``, for parameters without a native form."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tda_lightning.gradients.capture import Capture
from tda_lightning.gradients.fused_layers import normalized_weight
from tda_lightning.records.errors import EngineError
from tda_lightning.runtime.module_state import restored
from tda_lightning.tasks import batches
from tda_lightning.tasks.batches import Batch

# (module, batch, indices of its examples) -> losses [batch]
Loss: TypeAlias = Callable[[nn.Module, Batch, Tensor], Tensor]

# Examples differentiated at once: enough to be quick, few enough for the memory of one batch.
_CHUNK = 64


class Lossy(nn.Module):
    """A module whose forward is the loss, so that ``functional_call`` can swap parameters."""

    def __init__(self, module: nn.Module, loss: Loss):
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, batch: Batch, examples: Tensor) -> Tensor:
        """``loss(module, batch, examples)``."""
        return self.loss(self.module, batch, examples)


@contextmanager
def parameters_frozen(module: nn.Module, but: Collection[str] = ()) -> Iterator[None]:
    """Gradients for the parameters named in ``but`` and no others; restored at the end."""
    with restored(module, "requires_grad"):
        module.requires_grad_(False)
        for name in but:
            module.get_parameter(name).requires_grad_(True)
        yield


@contextmanager
def plain_recurrence(module: nn.Module) -> Iterator[None]:
    """Recurrent layers without cuDNN, whose backward pass refuses eval mode."""
    if not any(isinstance(part, nn.RNNBase) for part in module.modules()):
        yield
        return
    with torch.backends.cudnn.flags(enabled=False):
        yield


def functional_gradients(
    module: nn.Module,
    names: Sequence[str],
    loss: Loss,
    batch: Batch,
    examples: Tensor,
    together: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients of the named parameters, example by example: name -> [batch, *shape].

    Through ``vmap``; a model that ``vmap`` cannot take (packed sequences, Python branches on
    values) is differentiated one example at a time, with a warning that it is slow.

    Args:
        together: the losses of the examples in their batch, [batch], which those of batches of one
            must equal.

    Raises:
        EngineError: the loss of a batch of one example cannot be computed, or is another one.
    """
    if not names:
        return {}
    try:
        one = len(examples) == 1
        way = _one_by_one if one else _by_vmap
        losses, gradients = way(module, names, loss, batch, examples)
        if not one and not _alike(losses, together):
            # vmap cuts a batch in its own way.
            losses, gradients = _one_by_one(module, names, loss, batch, examples)
    except Exception as error:  # any failure of vmap has the same remedy
        warnings.warn(
            f"Per-example gradients of {', '.join(names)} are computed one example at a "
            f"time, which is slow: torch.func.vmap cannot take this model ({error}).",
            stacklevel=2,
        )
        try:
            losses, gradients = _one_by_one(module, names, loss, batch, examples)
        except Exception as alone:
            raise EngineError(
                f"Parameter {names[0]}: the loss of a batch of one example cannot be computed "
                f"({alone}). Either examples of a batch influence one another (batch statistics, a "
                "contrastive loss) and need company, or the batch cannot be cut into examples. "
                "Restrict attribution to other layers (task.layers) or write a task whose losses "
                "are separate."
            ) from alone
    if not _alike(losses, together):
        assert together is not None
        worst = int((losses - together.detach()).abs().argmax())
        raise EngineError(
            f"Parameter {names[0]}: the loss of example {int(examples[worst])} is "
            f"{float(together[worst].detach()):.6g} in its batch and {float(losses[worst]):.6g} "
            "alone. Either examples of a batch influence one another (batch statistics, a "
            "contrastive loss), or the loss draws random numbers, or the batch cannot be cut into "
            "examples. Restrict attribution to other layers (task.layers) or write a task whose "
            "losses are separate."
        )
    return {name: gradient.detach() for name, gradient in gradients.items()}


def _alike(alone: Tensor, together: Tensor | None) -> bool:
    """Whether the losses of single examples are those in the batch, but for rounding."""
    if together is None:
        return True
    together = together.detach()
    allowed = 10 * torch.finfo(together.dtype).eps ** 0.5
    largest = torch.maximum(together.abs().mean(), together.abs())
    return bool(((alone - together).abs() <= allowed * largest).all())


def _by_vmap(
    module: nn.Module, names: Sequence[str], loss: Loss, batch: Batch, examples: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves, sliced, single = batches.apart(batch, len(examples))
    lossy = Lossy(module, loss)
    values = {f"module.{name}": module.get_parameter(name).detach() for name in names}

    def example_loss(parameters: dict[str, Tensor], parts: list[Any], example: Tensor) -> Tensor:
        arguments = (single(parts), example[None])
        with Capture({}):
            return torch.func.functional_call(lossy, parameters, arguments).sum()

    axes = (None, sliced, 0)
    mapped = torch.func.vmap(torch.func.grad_and_value(example_loss), axes, chunk_size=_CHUNK)
    with parameters_frozen(module), torch.enable_grad():
        gradients, losses = mapped(values, leaves, examples)
    return losses.detach(), {name: gradients[f"module.{name}"] for name in names}


def _one_by_one(
    module: nn.Module, names: Sequence[str], loss: Loss, batch: Batch, examples: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The obvious way: a batch of one and plain autograd for every example."""
    rows: list[Sequence[Tensor]] = []
    losses = []
    parameters = [module.get_parameter(name) for name in names]
    with parameters_frozen(module, names), plain_recurrence(module), torch.enable_grad():
        for position in range(len(examples)):
            single = batches.take(batch, position, len(examples))
            value = loss(module, single, examples[position : position + 1]).sum()
            losses.append(value.detach())
            if value.requires_grad:
                own = torch.autograd.grad(value, parameters, materialize_grads=True)
                rows.append([g.to_dense() if g.is_sparse else g for g in own])
            else:
                rows.append([torch.zeros_like(parameter) for parameter in parameters])
    gradients = {
        name: torch.stack(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=True)
    }
    return torch.stack(losses), gradients


class TwiceDifferentiable(TorchFunctionMode):
    """Replaces what torch differentiates once but not twice."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is torch._weight_norm:
            return normalized_weight(*args, **kwargs)
        if func in (F.embedding, F.embedding_bag):
            kwargs = {**inspect.signature(func).bind(*args, **kwargs).arguments, "sparse": False}
            return func(**kwargs)
        return func(*args, **kwargs)


def ends_early(gradients: Sequence[Tensor | None]) -> bool:
    """Whether torch noted in a graph of gradients that it ends (``once_differentiable``): asked for
    the derivative by some inputs, torch passes over such a node and leaves out what is behind."""
    waiting = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == "torch::autograd::Error":
            return True
        following = {after for after, _ in node.next_functions if after is not None}
        waiting += following - seen
        seen |= following
    return False
