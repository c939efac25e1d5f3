"""Views of trained matrices and of stacks of them, and what is multiplied with them.

A linear layer may be written as ``inputs @ weight.T`` (Falcon's), and the scale of a norm as
``1 + weight`` (Gemma's). So a matrix that is transposed is followed to the product, and so is a
vector that a constant is added to.

Mixtures of experts use a stack matrix by matrix in a loop (``F.linear(x, stack[i])``), all at once
on rows sorted by expert (``grouped_mm``), with a copy of a matrix for every row, or on as many rows
for each (``bmm``); each with the stack as it is stored or transposed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tda_lightning.gradients.experts import Experts
from tda_lightning.gradients.operations import elementwise
from tda_lightning.gradients.uses import Linear, Product, Ref, Use

_GROUPED = frozenset(
    ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
)  # by name: not in all torch
_PRODUCTS = frozenset((torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__))
_OF_MATRIX = frozenset((torch.mm, Tensor.mm)) | _PRODUCTS
_WITH_SUM = frozenset((torch.addmm, Tensor.addmm))
_SHIFTS = frozenset((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__))
_CASTS = frozenset((Tensor.float, Tensor.double, Tensor.to, Tensor.type_as))
_SCALES = frozenset((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__))
_TRANSPOSITIONS = frozenset((torch.transpose, Tensor.transpose))
_LAST_TWO = frozenset((Tensor.mT.__get__,))  # type: ignore[attr-defined]
_OF_MATRICES = frozenset((Tensor.T.__get__, Tensor.t, torch.t))  # type: ignore[attr-defined]
_INDICES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class ParameterView:
    """A trained vector, matrix or stack of matrices as some call is given it.

    Attributes:
        ref: the parameter.
        count: matrices in the stack; 0 for what is no stack.
        dtype: of the parameter.
        transposed: whether their last two axes have changed places.
        chosen: one matrix, or one for each row, int64 [] or [rows]; None: the whole stack.
    """

    ref: Ref
    count: int
    dtype: torch.dtype
    transposed: bool = False
    chosen: Tensor | None = None


class ParameterViews:
    """Notes views of trained parameters, and describes what is multiplied with them.

    Args:
        trained: names of the trained parameters by their ids.
    """

    # Not the capture that asks: what is in a cycle stays until the garbage collector runs, and the
    # capture holds the inputs of all layers.
    def __init__(self, trained: Mapping[int, str]) -> None:
        self._trained = trained
        self._known: dict[int, tuple[weakref.ref[Tensor], ParameterView]] = {}

    def _stack(self, value: object) -> ParameterView | None:
        """What is known of a tensor, a trained stack itself included."""
        view = self.get(value)
        if view is None and isinstance(value, Tensor) and value.dim() in (1, 2, 3):
            name, height = self._trained.get(id(value)), value.shape[0]
            count = height if value.dim() == 3 else 0
            if name is not None:
                return ParameterView(Ref(name, 0, height, height), count, value.dtype)
        return view

    def get(self, value: object) -> ParameterView | None:
        """What is known of a tensor."""
        entry = self._known.get(id(value))
        return None if entry is None or entry[0]() is not value else entry[1]

    def among(self, values: Iterable[object]) -> bool:
        """Whether one of ``values`` is a view."""
        return bool(self._known) and any(self.get(value) is not None for value in values)

    def note(self, output: Tensor, view: ParameterView) -> None:
        """Remember what ``output`` is, unless a cast gave the parameter itself."""
        if id(output) in self._trained:
            return
        self._known[id(output)] = (weakref.ref(output), view)

    def made_by(self, func: Callable[..., Any], args: tuple[Any, ...]) -> ParameterView | None:
        """The view of a parameter that a call gives; None for any other call."""
        stack = args[0] if args else None
        view = self._stack(stack)
        if view is None:
            return None
        assert isinstance(stack, Tensor)
        if stack.dim() == 1:
            constant = not any(isinstance(arg, Tensor) for arg in args[1:])
            return view if func in _CASTS or (func in _SHIFTS and constant) else None
        last = {stack.dim() - 2, stack.dim() - 1}
        if (
            func in _LAST_TWO
            or (func in _OF_MATRICES and stack.dim() == 2)
            or (func in _TRANSPOSITIONS and {axis % stack.dim() for axis in args[1:]} == last)
        ):
            return replace(view, transposed=not view.transposed)
        if func is Tensor.__getitem__ and view.chosen is None and view.count:
            index = args[1]
            if type(index) is int:
                index = torch.tensor(index, device=stack.device)
            if isinstance(index, Tensor) and index.dim() < 2 and index.dtype in _INDICES:
                return replace(view, chosen=index.long() % view.count)
        return None

    def describe(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Use | None:
        """The use of a view by a call; None where it has no native form."""
        if func in _SCALES and not kwargs and self.among(args):
            return self._scaled(*args)
        if not kwargs and (use := self._linear(func, args)) is not None:
            return use
        if func is F.linear and len(args) == 2 and not kwargs:
            return self._loop(args[0], args[1], right=False)
        if getattr(func, "__name__", "") in _GROUPED and len(args) == 2:
            only_ends = all(v is None for name, v in kwargs.items() if name != "offs")
            ends = kwargs.get("offs")
            return self._grouped(args[0], args[1], ends) if only_ends else None
        if func not in _PRODUCTS or len(args) != 2 or kwargs:
            return None
        left, right = args
        if self._stack(left) is not None:
            return self._batched(left, right, right=False)
        if right.dim() == 2:
            return self._loop(left, right, right=True)
        return self._batched(right, left, right=True)

    def _scaled(self, input: object, other: object) -> Use | None:
        """A vector times an activation, elementwise."""
        use = elementwise(self._vector, input, other, scales=True)
        view = self.get(input) or self.get(other)
        if use is None or use.factor is None or view is None:
            return None
        # What was cast to a coarser precision has gradients of the parameter's own.
        precision = torch.promote_types(view.dtype, use.factor.dtype)
        return replace(use, factor=use.factor.to(precision))

    def _vector(self, value: Tensor | None) -> Ref | None:
        """The parameter of which ``value`` [size] is a view."""
        view = self.get(value)
        return None if view is None or value is None or value.dim() != 1 else view.ref

    def _linear(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Use | None:
        """inputs times a transposed matrix, or a linear layer with one, with or without a bias."""
        bias: Tensor | None = None
        if func in _WITH_SUM and len(args) == 3:
            bias, inputs, matrix = args
        elif func is F.linear and len(args) == 3:
            inputs, matrix, bias = args
        elif (func in _OF_MATRIX or func is F.linear) and len(args) == 2:
            inputs, matrix = args
        else:
            return None
        view = self.get(matrix)
        if view is None or view.count or inputs.dim() < 2 or inputs.is_complex():
            return None
        if id(inputs) in self._trained or self.get(inputs) is not None:
            return None
        if bias is not None and bias.dim() != 1:
            return None
        name = self._trained.get(id(bias))
        own = None if name is None or bias is None else Ref(name, 0, len(bias), len(bias))
        if view.transposed == (func is F.linear):
            rows = matrix.shape[0 if func is F.linear else 1]
            return Product(Ref(view.ref.name, 0, rows, rows), own, inputs.detach())
        return Linear(view.ref, own, inputs.detach())

    def _loop(self, inputs: Tensor, matrix: Tensor, right: bool) -> Experts | None:
        """inputs [rows, in] times one matrix, from the right or as a linear layer's weight."""
        view = self.get(matrix)
        if view is None or view.chosen is None or view.chosen.dim() or inputs.dim() != 2:
            return None
        expert = view.chosen.expand(len(inputs))
        return _experts(view, inputs, expert, view.transposed != right)

    def _grouped(self, inputs: Tensor, stack: Tensor, ends: Tensor | None) -> Experts | None:
        """Rows of inputs [rows, in], up to ``ends`` [experts] for each matrix [in, out]."""
        view = self._stack(stack)
        if view is None or view.chosen is not None or ends is None or inputs.dim() != 2:
            return None
        rows = torch.arange(len(inputs), device=ends.device, dtype=ends.dtype)
        expert = torch.searchsorted(ends, rows, right=True).clamp(max=view.count - 1)
        return _experts(view, inputs, expert, not view.transposed)

    def _batched(self, stack: Tensor, other: Tensor, right: bool) -> Experts | None:
        """``bmm`` of inputs [matrices, rows, in] and matrices [in, out], or the other way round."""
        view = self._stack(stack)
        if view is None or stack.dim() != 3 or other.dim() != 3 or len(stack) != len(other):
            return None
        if view.chosen is not None and view.chosen.dim() == 0:
            return None
        inputs = other if right else other.transpose(1, 2)
        expert = (
            torch.arange(view.count, device=stack.device) if view.chosen is None else view.chosen
        )
        rows = expert.repeat_interleave(inputs.shape[1])
        channels = (-1,) if right else (1,)
        return _experts(view, inputs.flatten(0, 1), rows, view.transposed != right, channels)


def _experts(
    view: ParameterView,
    inputs: Tensor,
    expert: Tensor,
    stored_transposed: bool,
    channels: tuple[int, ...] = (-1,),
) -> Experts:
    return Experts(view.ref, None, inputs.detach(), expert, view.count, stored_transposed, channels)
