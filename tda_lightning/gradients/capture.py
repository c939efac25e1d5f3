"""Watch a forward pass and keep, at every use of a trained parameter, the layer's input.

A ``TorchFunctionMode`` sees the functional calls that modules end in (``F.linear``,
``F.conv2d``, ...), so a parameter is known by identity, whoever uses it and however often: tied
weights, a layer called several times and ``F.linear(x, other.weight)`` need no special case.
Parameters are detached in the call: the backward pass yields the gradients of the layers' outputs
and never spends time on weight gradients that would be thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tda_lightning.gradients import native
from tda_lightning.gradients.layout import Layout

# Reading these of a parameter does not make a result depend on its values.
_METADATA = frozenset(
    "__get__ __len__ __repr__ __hash__ size dim ndimension numel stride storage_offset "  # noqa: SIM905
    "is_floating_point is_complex is_contiguous data_ptr element_size get_device detach".split()
)
# ... but these attributes are views of the values.
_VALUE_GETTERS = frozenset(
    getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")
)


@dataclass(frozen=True)
class Ref:
    """A trained parameter, or the rows ``start`` to ``stop`` of one."""

    name: str
    start: int
    stop: int
    height: int  # rows of the whole parameter


@dataclass
class Use:
    """One use of trained parameters by one functional call.

    ``kind`` says how ``saved`` and the output's gradient make per-example gradients (see
    ``assemble.py``); ``channel_axes`` are the axes of the output that hold no examples.
    """

    kind: str
    weight: Ref | None
    bias: Ref | None
    saved: Any
    channel_axes: tuple[int, ...]
    output_shape: torch.Size
    gradient: Tensor | None = None
    layout: Layout | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Uses with the same key have the same layout."""
        names = [ref.name if ref else "" for ref in (self.weight, self.bias)]
        return (self.kind, names[0], names[1], len(self.output_shape))


class Capture(TorchFunctionMode):
    """Records every :class:`Use` of the trained parameters while active.

    ``dummy`` is a zero scalar leaf that requires a gradient; without it nothing is recorded and
    the mode only decomposes fused layers.

    Attributes:
        uses: in order of the calls.
        generic: names of parameters that were used in some way without a native form.
    """

    def __init__(self, trained: dict[int, str], dummy: Tensor | None = None):
        super().__init__()
        self.trained = trained
        self.dummy = dummy
        self.uses: list[Use] = []
        self.generic: set[str] = set()

    def __torch_function__(  # type: ignore[override]
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = native.HANDLERS.get(func)
        if handler is not None:
            if handler is not native.elementwise:
                # A parameter fed in as an *input* (learned queries) has no native form.
                self.mark_generic(args[:1] or (kwargs.get("input"),))
            return handler(self, func, *args, **kwargs)
        if func.__name__ not in _METADATA or func in _VALUE_GETTERS:
            self.mark_generic((*args, *kwargs.values()))
        return func(*args, **kwargs)

    def mark_generic(self, values: Iterable[Any]) -> None:
        """Remember the trained parameters among ``values`` as having no native form."""
        for value in values:
            if isinstance(value, Tensor):
                name = self.trained.get(id(value))
                if name is not None:
                    self.generic.add(name)
            elif isinstance(value, (list, tuple)):
                self.mark_generic(value)

    def ref(self, tensor: Tensor | None, rows: slice | None = None) -> Ref | None:
        if tensor is None or (name := self.trained.get(id(tensor))) is None:
            return None
        height = tensor.shape[0] if tensor.dim() else 1
        start, stop, _ = (rows or slice(None)).indices(height)
        return Ref(name, start, stop, height)

    def record(
        self,
        kind: str,
        output: Tensor,
        weight: Ref | None,
        bias: Ref | None,
        saved: Any,
        channel_axes: tuple[int, ...],
    ) -> Tensor:
        """Register a use and make its output's gradient reach it."""
        if self.dummy is None or (weight is None and bias is None):
            return output
        if not torch.is_grad_enabled():
            return output  # under no_grad() a parameter is a constant, for autograd and for us
        if not output.requires_grad:
            # Nothing upstream needs a gradient: a zero leaf gives the output a history without
            # making it a leaf itself (in-place activations may follow).
            output = output + self.dummy.to(output.dtype)
        use = Use(kind, weight, bias, saved, channel_axes, output.shape)
        self.uses.append(use)

        def keep(gradient: Tensor) -> None:
            use.gradient = gradient

        output.register_hook(keep)
        return output

    def constant(self, tensor: Any) -> Any:
        """The parameter as the call uses it: without its own gradient while recording."""
        return tensor if tensor is None or self.dummy is None else tensor.detach()

    def linear(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        rows: slice | None = None,
        bias_rows: slice | None = None,
    ) -> Tensor:
        """``F.linear`` with the given rows of weight and bias, recorded."""
        used, used_bias = self.constant(weight), self.constant(bias)
        if rows is not None:
            used = used[rows]
        if used_bias is not None and (bias_rows or rows) is not None:
            used_bias = used_bias[bias_rows or rows]
        return self.record(
            "linear",
            F.linear(inputs, used, used_bias),
            self.ref(weight, rows),
            self.ref(bias, bias_rows or rows),
            inputs.detach(),
            (-1,),
        )
