"""Outputs that a layer has once for all examples, followed to where they are broadcast to each.

Embeddings of positions are looked up once, [positions, width] or [1, positions, width], and added
to what every example has. Biases of relative positions (T5) are looked up once, laid out anew,
masked, and given to the attention of every layer. Where such an output meets the examples, the
gradient of the result is, for each example, the gradient of the layer's output.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.gradients.uses import Use

_SUMS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__"))
_COPIES = frozenset(("view", "reshape", "contiguous"))  # or views, of the shape that they had
_VIEWS = _COPIES | {"unsqueeze", "__getitem__", "permute", "transpose", "movedim", "swapaxes"}

Axes = tuple[int | None, ...]


@dataclass(frozen=True)
class SharedOutput:
    """A tensor that holds the output of a use, its axes in another order and masked perhaps.

    Attributes:
        use: whose output it is.
        value: the tensor.
        axes: for each axis of ``value`` the axis of the use's output; None for one of length 1
            that the output need not have.
        kept: where the output goes on to count, broadcast against ``value``; None: everywhere.
    """

    use: Use
    value: Tensor
    axes: Axes
    kept: Tensor | None = None

    def for_each_example(self, output: Tensor) -> Use | None:
        """The use as if it had been called for every example, where ``value`` was broadcast to
        ``output``; None for a kind of use that cannot."""
        axes = [*[None] * (output.dim() - self.value.dim()), *self.axes]
        new = [position for position, axis in enumerate(axes) if axis is None]
        own = sorted((axis, position) for position, axis in enumerate(axes) if axis is not None)
        order = (*new, *(position for _, position in own))
        expanded = self.use.expanded(output.detach().permute(order))
        if expanded is not None:
            expanded.gradient, expanded.order, expanded.kept = None, order, self.kept
        return expanded


class SharedOutputs:
    """Follows the outputs of uses through calls that only lay them out anew."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Use, Axes, Tensor | None]] = {}

    def add(self, use: Use, output: Tensor) -> None:
        """Follow the output of a use."""
        self._put(output, use, tuple(range(output.dim())), None)

    def _put(self, output: Tensor, use: Use, axes: Axes, kept: Tensor | None) -> None:
        self._known[id(output)] = (weakref.ref(output), use, axes, kept)

    def get(self, value: object) -> SharedOutput | None:
        """What is known of a tensor."""
        entry = self._known.get(id(value))
        if entry is None or entry[0]() is not value:
            return None
        assert isinstance(value, Tensor)
        return SharedOutput(entry[1], value, *entry[2:])

    def follow(self, name: str, given: Sequence[object], output: Tensor) -> Iterator[SharedOutput]:
        """Note ``output`` of the function ``name`` if it is followed on.

        Yields:
            Those among the arguments that the call has broadcast to ``output``.
        """
        if name not in _VIEWS and name not in _SUMS and name != "where":
            return
        for shared in map(self.get, given):
            if shared is None:
                continue
            if name in _VIEWS:
                self._follow_view(name, shared, output)
            elif name == "where":
                kept = _chosen(shared, given)
                if kept is None:
                    continue
                if output.shape == shared.value.shape:
                    self._put(output, shared.use, shared.axes, kept)
                else:
                    yield SharedOutput(shared.use, shared.value, shared.axes, kept)
            elif len(given) == 2 and output.shape != shared.value.shape:
                yield shared

    def _follow_view(self, name: str, shared: SharedOutput, output: Tensor) -> None:
        value, use = shared.value, shared.use
        if name in _COPIES and output.shape == value.shape:
            self._put(output, use, shared.axes, shared.kept)
        elif shared.kept is None and (places := _places(value, output)) is not None:
            axes = tuple(None if place is None else shared.axes[place] for place in places)
            missing = set(range(len(use.output_shape))) - set(axes)
            # Leading axes of length 1 may go: that is where the examples come in.
            if missing == set(range(len(missing))):
                self._put(output, use, axes, None)


def _chosen(shared: SharedOutput, given: Sequence[object]) -> Tensor | None:
    """Where ``torch.where`` takes the tensor; None where that cannot be said."""
    tensors = [value for value in given if isinstance(value, Tensor)]
    conditions = [value for value in tensors if value.dtype == torch.bool]
    if len(given) != 3 or len(conditions) != 1 or shared.kept is not None:
        return None
    first = next(v for v in given if v is not conditions[0])
    return conditions[0] if first is shared.value else ~conditions[0]


def _places(value: Tensor, output: Tensor) -> list[int | None] | None:
    """For each axis of ``output``, the axis of ``value`` that it is; None for one of length 1.

    None where ``output`` is no view of ``value`` with its axes in another order.
    """
    if output.data_ptr() != value.data_ptr() or output.numel() != value.numel():
        return None
    sizes = enumerate(zip(value.shape, value.stride(), strict=True))
    known: dict[tuple[int, int], int] = {pair: axis for axis, pair in sizes if pair[0] > 1}
    places: list[int | None] = []
    for pair in zip(output.shape, output.stride(), strict=True):
        if pair[0] > 1 and pair not in known:
            return None
        places.append(known[pair] if pair[0] > 1 else None)
    return places
