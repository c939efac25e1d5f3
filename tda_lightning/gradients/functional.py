"""Per-example gradients through ``torch.func``, for parameters without a native form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tda_lightning.gradients.capture import Capture
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
    module: nn.Module, names: Sequence[str], loss: Loss, batch: Batch, examples: Tensor
) -> dict[str, Tensor]:
    """Gradients of the named parameters, example by example: name -> [batch, *shape].

    Through ``vmap``; a model that ``vmap`` cannot take (packed sequences, Python branches on
    values) is differentiated one example at a time, with a warning that it is slow.

    Raises:
        EngineError: the loss of a batch of one example cannot be computed.
    """
    if not names:
        return {}
    lossy = Lossy(module, loss)
    values = {f"module.{name}": module.get_parameter(name).detach() for name in names}
    with parameters_frozen(module), torch.enable_grad():
        try:
            gradients = _by_vmap(lossy, values, batch, examples)
        except Exception as error:  # any failure of vmap has the same remedy
            warnings.warn(
                f"Per-example gradients of {', '.join(names)} are computed one example at a "
                f"time, which is slow: torch.func.vmap cannot take this model ({error}).",
                stacklevel=2,
            )
            try:
                with plain_recurrence(module):
                    gradients = _one_by_one(lossy, values, batch, examples)
            except Exception as alone:
                raise EngineError(
                    f"Parameter {names[0]}: the loss of a batch of one example cannot be computed "
                    f"({alone}). Examples of a batch influence one another (batch statistics, a "
                    "contrastive loss), or the model needs several. Restrict attribution to other "
                    "layers (task.layers) or write a task whose losses are separate."
                ) from alone
    return {name: gradients[f"module.{name}"].detach() for name in names}


def _by_vmap(
    lossy: Lossy, values: dict[str, Tensor], batch: Batch, examples: Tensor
) -> dict[str, Tensor]:
    leaves, structure = pytree.tree_flatten(batch)
    sliced = [isinstance(leaf, Tensor) and leaf.shape[:1] == examples.shape for leaf in leaves]

    def example_loss(parameters: dict[str, Tensor], parts: list[Any], example: Tensor) -> Tensor:
        single = [part[None] if cut else part for part, cut in zip(parts, sliced, strict=True)]
        arguments = (pytree.tree_unflatten(single, structure), example[None])
        with Capture({}):
            return torch.func.functional_call(lossy, parameters, arguments).sum()

    axes = (None, [0 if cut else None for cut in sliced], 0)
    mapped = torch.func.vmap(torch.func.grad(example_loss), axes, chunk_size=_CHUNK)
    return mapped(values, leaves, examples)  # type: ignore[no-any-return]


def _one_by_one(
    lossy: Lossy, values: dict[str, Tensor], batch: Batch, examples: Tensor
) -> dict[str, Tensor]:
    """The obvious way: a batch of one and plain autograd for every example."""
    rows = []
    for position in range(len(examples)):
        parameters = {name: value.clone().requires_grad_() for name, value in values.items()}
        single = batches.take(batch, position, len(examples))
        arguments = (single, examples[position : position + 1])
        loss = torch.func.functional_call(lossy, parameters, arguments).sum()
        rows.append(torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True))
    return {
        name: torch.stack(parts)
        for name, parts in zip(values, zip(*rows, strict=True), strict=True)
    }


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
