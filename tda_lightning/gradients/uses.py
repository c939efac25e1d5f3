"""How functional calls use trained parameters, and the per-example gradients that follow.

One class for each kind of use. It holds what the call was given; once the gradient of the call's
output is there, :meth:`Use.add_to` adds the call's part of the per-example gradients. To support
another kind of layer, add a class here and its function in ``operations.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tda_lightning.gradients.blocks import Block, BlockParts, block_name
from tda_lightning.gradients.composite import Rows
from tda_lightning.gradients.forms import Gradient
from tda_lightning.gradients.layout import Layout


@dataclass(frozen=True)
class Ref:
    """Rows ``start`` to ``stop`` of a trained parameter that has ``height`` of them."""

    name: str
    start: int
    stop: int
    height: int

    def padded(self, outputs: Tensor) -> Tensor:
        """``outputs`` [..., stop - start] with zeros for the rows that were not used."""
        if (self.start, self.stop) == (0, self.height):
            return outputs
        return F.pad(outputs, (self.start, self.height - self.stop))


@dataclass(eq=False)
class WatchedOutput:
    """An output of the forward pass, and the gradient that has arrived at its edge of the graph."""

    edge: GradientEdge = field(init=False)
    gradient: Tensor | None = field(init=False, default=None)


@dataclass(eq=False)
class Use(WatchedOutput, ABC):
    """One use of trained parameters by one functional call.

    Attributes:
        weight, bias: the trained parameters; None where there is none.
        output_shape: of the call's output.
        layout: where the examples are in the output; set before :meth:`add_to`.
        row: True where weight and bias form a block of one row.
    """

    weight: Ref | None
    bias: Ref | None
    output_shape: torch.Size = field(init=False)
    layout: Layout | None = field(init=False, default=None)
    row: ClassVar[bool] = False

    @property
    def refs(self) -> list[Ref]:
        """The trained parameters used."""
        return [ref for ref in (self.weight, self.bias) if ref is not None]

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """Axes of the output that hold no examples."""
        return (-1,)

    @property
    def key(self) -> tuple[object, ...]:
        """Uses with the same key have the same layout."""
        return (type(self), self.weight and self.weight.name, self.bias and self.bias.name,
                len(self.output_shape))  # fmt: skip

    @abstractmethod
    def add_to(self, parts: BlockParts, batch: int) -> None:
        """Add the gradients of ``batch`` examples to those of their blocks."""

    def batch_first(self, values: Tensor | None, batch: int) -> Tensor:
        """``values``, laid out as the output is, with the example axis in front."""
        assert values is not None and self.layout is not None
        return self.layout.batch_first(values, batch)

    def widen(self) -> None:
        """Hold half precision as float32: sums of squares leave its range."""
        for name in (item.name for item in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, value.float())


class MatrixProduct(Use):
    """A weight multiplies inputs at several positions: D_n = sum_t b_nt a_nt^T."""

    @abstractmethod
    def outputs(self, batch: int) -> Tensor:
        """Output gradients b, [batch, groups, positions, rows]."""

    @abstractmethod
    def columns(self, batch: int, constant: float | None) -> Callable[[slice], Tensor]:
        """Layer inputs a of a slice of the examples, [chunk, groups, positions, columns].

        ``constant`` is the bias's input, as one more column; None for no such column.
        """

    def add_to(self, parts: BlockParts, batch: int) -> None:
        weight, bias = self.weight, self.bias
        outputs = self.outputs(batch)
        if bias is not None and (weight is None or not parts.joined(weight.name, bias.name)):
            parts.add_dense(bias.name, bias.padded(outputs).sum(2).flatten(1))
        if weight is not None:
            constant = 0.0 if bias is None else 1.0
            has_column = parts.block(weight.name).bias_column
            columns = self.columns(batch, constant if has_column else None)
            parts.add_outer(weight.name, columns, weight.padded(outputs))


@dataclass(eq=False)
class Linear(MatrixProduct):
    """inputs @ weight^T + bias, along the last axis."""

    inputs: Tensor

    def outputs(self, batch: int) -> Tensor:
        gradient = self.batch_first(self.gradient, batch)
        return gradient.reshape(batch, 1, -1, gradient.shape[-1])

    def columns(self, batch: int, constant: float | None) -> Callable[[slice], Tensor]:
        inputs = self.batch_first(self.inputs, batch).reshape(batch, 1, -1, self.inputs.shape[-1])
        if constant is None:
            return inputs.__getitem__
        return lambda rows: F.pad(inputs[rows], (0, 1), value=constant)


@dataclass(eq=False)
class Convolution(MatrixProduct):
    """A convolution over any number of spatial axes: a product with the patches of its images."""

    images: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def channel_axes(self) -> tuple[int, ...]:
        return tuple(range(1, len(self.kernel) + 2))

    def outputs(self, batch: int) -> Tensor:
        gradient, spatial = self.batch_first(self.gradient, batch), len(self.kernel)
        rows, positions = gradient.shape[-spatial - 1], gradient.shape[-spatial:].numel()
        split = gradient.reshape(batch, -1, self.groups, rows // self.groups, positions)
        return split.permute(0, 2, 1, 4, 3).flatten(2, 3)

    def columns(self, batch: int, constant: float | None) -> Callable[[slice], Tensor]:
        images = self.batch_first(self.images, batch)
        images = images.reshape(batch, -1, *images.shape[-len(self.kernel) - 1 :])

        def patches(rows: slice) -> Tensor:
            chunk = images[rows]
            unfolded = self.unfold(chunk.flatten(0, 1), constant)
            return unfolded.unflatten(0, chunk.shape[:2]).transpose(1, 2).flatten(2, 3)

        return patches

    def unfold(self, images: Tensor, constant: float | None) -> Tensor:
        """Patches that the weight multiplies: [batch, groups, positions, columns].

        Columns are (channels of the group, *kernel), the order of the weight's own axes, and
        ``constant`` fills one more at the end.
        """
        if any(self.padding):
            images = F.pad(images, [pad for pad in reversed(self.padding) for _ in range(2)])
        spatial = len(self.kernel)
        for axis in range(spatial):
            spread = self.dilation[axis]
            extent = spread * (self.kernel[axis] - 1) + 1
            images = images.unfold(2 + axis, extent, self.stride[axis])[..., ::spread]
        images = images.unflatten(1, (self.groups, -1))
        offsets = range(3 + spatial, 3 + 2 * spatial)
        patches = images.permute(0, 1, 2, *offsets, *range(3, 3 + spatial))
        own = patches.shape[2 : 3 + spatial]  # channels of the group, *kernel
        # One copy, positions innermost as in the images: several times faster than columns
        # innermost.
        width = own.numel() + (constant is not None)
        filled = patches.new_empty(*patches.shape[:2], width, *patches.shape[-spatial:])
        filled[:, :, : own.numel()].unflatten(2, own).copy_(patches)
        if constant is not None:
            filled[:, :, -1] = constant
        return filled.flatten(3).transpose(2, 3)


@dataclass(eq=False)
class Embedding(Use):
    """Rows of the weight looked up by ``index``; row ``padding`` gets no gradient."""

    index: Tensor
    padding: int | None

    def add_to(self, parts: BlockParts, batch: int) -> None:
        assert self.weight is not None
        index = self.batch_first(self.index, batch).reshape(batch, -1)
        values = self.batch_first(self.gradient, batch).reshape(*index.shape, -1)
        block = parts.block(self.weight.name)
        if block.bias_column:
            values = F.pad(values, (0, 1))
        example = torch.arange(batch, device=index.device)[:, None].expand_as(index)
        used = torch.ones_like(index, dtype=torch.bool)
        if self.padding is not None:
            used = index != self.padding
        rows = Rows(example[used], index[used], values[used], batch, block.shape[1])
        parts.add_rows(self.weight.name, rows)


@dataclass(eq=False)
class ScaleAndShift(Use):
    """factor * weight + bias, elementwise; parameters of ``shape`` lie on the output's ``axes``."""

    factor: Tensor | None
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def channel_axes(self) -> tuple[int, ...]:
        return self.axes

    def add_to(self, parts: BlockParts, batch: int) -> None:
        assert self.gradient is not None
        if self.weight is not None:
            assert self.factor is not None
            self._add(parts, self.weight, self.gradient * self.factor, batch)
        if self.bias is not None:
            self._add(parts, self.bias, self.gradient, batch)

    def _add(self, parts: BlockParts, ref: Ref, values: Tensor, batch: int) -> None:
        moved = values.movedim(self.axes, tuple(range(-len(self.axes), 0)))
        summed = self.batch_first(moved, batch).reshape(batch, -1, *self.shape).sum(1)
        parts.add_dense(ref.name, summed)


class Norm(ScaleAndShift):
    """The scale and shift of a normalisation; ``factor`` is the normalised input."""

    row = True


def plan_blocks(
    shapes: Mapping[str, tuple[int, ...]], uses: Iterable[Use], generic: Iterable[str] = ()
) -> list[Block]:
    """Group parameters into blocks by how they were used.

    A weight and a bias that are only ever used with each other share a block. A parameter that is
    ``generic``, or that was not used, is a block of its own.
    """
    native = set(shapes) - set(generic)
    partners: dict[str, set[str]] = defaultdict(set)  # "" for a use that rules out joining
    last_use: dict[str, Use] = {}
    for use in uses:
        weight, bias = (
            ref if ref is not None and ref.name in native else None
            for ref in (use.weight, use.bias)
        )
        if weight is not None:
            last_use[weight.name] = use
        if bias is not None:
            partners[bias.name].add("" if weight is None else weight.name)
            if weight is not None:
                rows = [(ref.start, ref.stop, ref.height) for ref in (weight, bias)]
                partners[weight.name].add(bias.name if rows[0] == rows[1] else "")
    joined = {}  # bias by weight
    for weight_name in last_use:
        names = partners[weight_name]
        if len(names) == 1 and partners[min(names)] == {weight_name}:
            joined[weight_name] = min(names)
    blocks = []
    for name, shape in shapes.items():
        if name in joined.values():
            continue
        parameters = (name, joined[name]) if name in joined else (name,)
        last = last_use.get(name)
        row = len(shape) < 2 or (last is not None and last.row)
        blocks.append(
            Block(
                name=block_name(name),
                parameters=parameters,
                shapes=tuple(shapes[parameter] for parameter in parameters),
                groups=last.groups if isinstance(last, Convolution) else 1,
                bias_column=not row and len(parameters) == 2,
                row=row,
            )
        )
    return blocks


def assemble(
    blocks: Sequence[Block], uses: Iterable[Use], batch: int, generic: Mapping[str, Tensor]
) -> dict[str, Gradient]:
    """Per-example gradient of every block by name.

    Args:
        blocks: as planned.
        uses: of their parameters in this batch, with layouts and output gradients.
        batch: number of examples.
        generic: gradients [batch, *shape] of the parameters that no use has.

    Raises:
        EngineError: nothing has a gradient.
    """
    parts = BlockParts(blocks)
    for use in uses:
        if use.gradient is not None:
            use.add_to(parts, batch)
    for name, values in generic.items():
        parts.add_dense(name, values)
    return parts.gradients(batch)
