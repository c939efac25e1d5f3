"""Views of trained stacks of matrices [experts, out, in], and what is multiplied with them.

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
from tda_lightning.gradients.uses import Ref

_GROUPED = frozenset(
    ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
)  # by name: not in all torch
_PRODUCTS = frozenset((torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__))
_TRANSPOSITIONS = frozenset((torch.transpose, Tensor.transpose))
_LAST_TWO = frozenset((Tensor.mT.__get__,))  # type: ignore[attr-defined]
_OF_MATRICES = frozenset((Tensor.T.__get__, Tensor.t, torch.t))  # type: ignore[attr-defined]
_INDICES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class ParameterView:
    """A trained stack of matrices as some call is given it.

    Attributes:
        ref: the parameter.
        count: matrices in the stack.
        transposed: whether their last two axes have changed places.
        chosen: one matrix, or one for each row, int64 [] or [rows]; None: the whole stack.
    """

    ref: Ref
    count: int
    transposed: bool = False
    chosen: Tensor | None = None


class ParameterViews:
    """Notes views of trained stacks of matrices, and describes what is multiplied with them.

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
        if view is None and isinstance(value, Tensor) and value.dim() == 3:
            name, count = self._trained.get(id(value)), value.shape[0]
            return None if name is None else ParameterView(Ref(name, 0, count, count), count)
        return view

    def get(self, value: object) -> ParameterView | None:
        """What is known of a tensor."""
        entry = self._known.get(id(value))
        return None if entry is None or entry[0]() is not value else entry[1]

    def among(self, values: Iterable[object]) -> bool:
        """Whether one of ``values`` is a view."""
        return bool(self._known) and any(self.get(value) is not None for value in values)

    def note(self, output: Tensor, view: ParameterView) -> None:
        """Remember what ``output`` is."""
        self._known[id(output)] = (weakref.ref(output), view)

    def made_by(self, func: Callable[..., Any], args: tuple[Any, ...]) -> ParameterView | None:
        """The view of a stack that a call gives; None for any other call."""
        stack = args[0] if args else None
        view = self._stack(stack)
        if view is None:
            return None
        assert isinstance(stack, Tensor)
        last = {stack.dim() - 2, stack.dim() - 1}
        if (
            func in _LAST_TWO
            or (func in _OF_MATRICES and stack.dim() == 2)
            or (func in _TRANSPOSITIONS and {axis % stack.dim() for axis in args[1:]} == last)
        ):
            return replace(view, transposed=not view.transposed)
        if func is Tensor.__getitem__ and view.chosen is None:
            index = args[1]
            if type(index) is int:
                index = torch.tensor(index, device=stack.device)
            if isinstance(index, Tensor) and index.dim() < 2 and index.dtype in _INDICES:
                return replace(view, chosen=index.long() % view.count)
        return None

    def describe(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Experts | None:
        """The use of a stack by a call; None where it has no native form."""
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
