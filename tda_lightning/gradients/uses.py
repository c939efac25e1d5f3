"""How functional calls use trained parameters, and the per-example gradients that follow.

One class for each kind of use. It holds what the call was given; once the gradient of the call's
output is there, :meth:`Use.add_to` adds the call's part of the per-example gradients. To support
another kind of layer, add a class here and its function in ``operations.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tda_lightning.gradients.blocks import Block, BlockParts, block_name
from tda_lightning.gradients.forms import Gradient
from tda_lightning.gradients.layout import Layout, RowOwners
from tda_lightning.gradients.rows import Rows


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


@dataclass(frozen=True)
class Storage:
    """How a parameter holds the matrices of a layer: a stack of ``stack`` [rows, columns], or
    [columns, rows]; 0 for a matrix that is no stack."""

    stack: int = 0
    transposed: bool = False


@dataclass(eq=False)
class WatchedOutput:
    """An output of the forward pass, and the gradient that has arrived at its edge of the graph.

    Attributes:
        order: of the output's axes in ``gradient``; None: its own.
        kept: which entries of the gradient count, broadcast against it; None: all.
    """

    edge: GradientEdge = field(init=False)
    gradient: Tensor | None = field(init=False, default=None)
    order: tuple[int, ...] | None = field(init=False, default=None)
    kept: Tensor | None = field(init=False, default=None)

    def arrive(self, gradient: Tensor | None) -> None:
        """Take the gradient of the output."""
        if gradient is not None and self.kept is not None:
            gradient = gradient * self.kept
        if gradient is not None and self.order is not None:
            gradient = gradient.permute(self.order)
        self.gradient = gradient


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
    layout: Layout | RowOwners | None = field(init=False, default=None)
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
    def input_scalars(self) -> int:
        """Of what the call was given and is kept."""
        values = (getattr(self, item.name) for item in fields(self) if item.init)
        return sum(value.numel() for value in values if isinstance(value, Tensor))

    @property
    def storage(self) -> Storage:
        """How the weight is stored."""
        return Storage()

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

    def used(self, batch: int) -> Tensor | None:
        """Where :meth:`batch_first` holds rows, [batch, rows]; None for everywhere."""
        if not isinstance(self.layout, RowOwners):
            return None
        used = self.layout.used(batch)
        return None if bool(used.all()) else used

    def rows(self, values: Tensor) -> Tensor:
        """``values``, laid out as the output is, by row: [rows, channels]."""
        axes = [axis % values.dim() for axis in self.channel_axes]
        moved = values.movedim(axes, list(range(values.dim() - len(axes), values.dim())))
        return moved.reshape(-1, moved.shape[values.dim() - len(axes) :].numel())

    def by_row(self) -> Use:
        """The same use with one axis of rows in front."""
        return self

    def expanded(self, gradient: Tensor) -> Use | None:
        """This use as if it had been called for every example: ``gradient`` is that of what its
        output was broadcast to. None for a kind that cannot."""
        return None

    def same(self, gradient: Tensor, **given: object) -> Use:
        """This use with other tensors of the same rows."""
        other = replace(self, **given)  # type: ignore[arg-type]
        other.gradient, other.output_shape, other.layout = gradient, gradient.shape, self.layout
        other.edge = self.edge
        return other

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
            used = self.used(batch)
            filled = None
            if used is not None:
                rows = used.sum(1) * (outputs.shape[2] // used.shape[1])
                filled = rows[:, None].expand(outputs.shape[:2])
            parts.add_outer(weight.name, columns, weight.padded(outputs), filled)


@dataclass(eq=False)
class Linear(MatrixProduct):
    """inputs @ weight^T + bias, along the last axis."""

    inputs: Tensor

    def by_row(self) -> Use:
        assert self.gradient is not None
        rows, columns = self.gradient.shape[-1], self.inputs.shape[-1]
        inputs = self.inputs.reshape(-1, columns)
        return self.same(self.gradient.reshape(-1, rows), inputs=inputs)

    def expanded(self, gradient: Tensor) -> Use:
        inputs = self.inputs.expand(*gradient.shape[:-1], self.inputs.shape[-1])
        return self.same(gradient, inputs=inputs)

    def outputs(self, batch: int) -> Tensor:
        gradient = self.batch_first(self.gradient, batch)
        return gradient.reshape(batch, 1, -1, gradient.shape[-1])

    def columns(self, batch: int, constant: float | None) -> Callable[[slice], Tensor]:
        inputs = self.batch_first(self.inputs, batch).reshape(batch, 1, -1, self.inputs.shape[-1])
        if constant is None:
            return inputs.__getitem__
        used = self.used(batch)
        if used is not None:
            column = constant * used.to(inputs.dtype)[:, None, :, None]
            return lambda rows: torch.cat([inputs[rows], column[rows]], dim=-1)
        return lambda rows: F.pad(inputs[rows], (0, 1), value=constant)


@dataclass(eq=False)
class Product(Linear):
    """inputs @ weight + bias, along the last axis, as in the ``Conv1D`` of GPT-2: a linear layer
    whose weight is stored as [inputs, outputs]."""

    @property
    def storage(self) -> Storage:
        return Storage(transposed=True)


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
        used = self.used(batch)

        def patches(rows: slice) -> Tensor:
            chunk = images[rows]
            unfolded = self.unfold(chunk.flatten(0, 1), constant)
            if used is not None:  # the constant too is there only where an image is
                unfolded = unfolded * used[rows].flatten().to(unfolded)[:, None, None, None]
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

    def by_row(self) -> Use:
        assert self.gradient is not None
        width = self.gradient.shape[-1]
        return self.same(self.gradient.reshape(-1, width), index=self.index.flatten())

    def expanded(self, gradient: Tensor) -> Use:
        return self.same(gradient, index=self.index.expand(gradient.shape[:-1]))

    def add_to(self, parts: BlockParts, batch: int) -> None:
        assert self.weight is not None
        index = self.batch_first(self.index, batch).reshape(batch, -1)
        values = self.batch_first(self.gradient, batch).reshape(*index.shape, -1)
        block = parts.block(self.weight.name)
        if block.bias_column:
            values = F.pad(values, (0, 1))
        example = torch.arange(batch, device=index.device)[:, None].expand_as(index)
        used = self.used(batch)
        used = torch.ones_like(index, dtype=torch.bool) if used is None else used.view_as(index)
        if self.padding is not None:
            used = used & (index != self.padding)
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

    def by_row(self) -> Use:
        assert self.gradient is not None
        axes = tuple(range(1, 1 + len(self.axes)))
        width = [self.gradient.shape[axis] for axis in self.axes]
        gradient, factor = (
            None if value is None else self.rows(value).unflatten(1, width or [1])
            for value in (self.gradient, self.factor)
        )
        if not axes:
            gradient, factor = (None if v is None else v.flatten() for v in (gradient, factor))
        assert gradient is not None
        return self.same(gradient, factor=factor, axes=axes)

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


def joined(uses: Iterable[Use]) -> list[Use]:
    """Uses whose rows are known one by one are put together where they are alike: a layer called
    for one example after the other is one use."""
    alike: dict[tuple[object, ...], list[Use]] = {}
    out: list[Use] = []
    for use in uses:
        if isinstance(use.layout, RowOwners) and use.gradient is not None:
            row = use.by_row()
            row.layout = use.layout
            alike.setdefault(_kind(row), []).append(row)
        else:
            out.append(use)
    return out + [group[0] if len(group) == 1 else _join(group) for group in alike.values()]


def _kind(use: Use) -> tuple[object, ...]:
    assert use.gradient is not None
    values = [getattr(use, item.name) for item in fields(use) if item.init]
    plain = [(*v.shape[1:], v.dtype) if isinstance(v, Tensor) else v for v in values]
    return (type(use), *plain, use.gradient.shape[1:], use.gradient.dtype)


def _join(uses: Sequence[Use]) -> Use:
    first = uses[0]
    tensors = {
        item.name: torch.cat([getattr(use, item.name) for use in uses])
        for item in fields(first)
        if item.init and isinstance(getattr(first, item.name), Tensor)
    }
    gradients = [use.gradient for use in uses if use.gradient is not None]
    out = first.same(torch.cat(gradients), **tensors)
    owners = [use.layout.owner for use in uses if isinstance(use.layout, RowOwners)]
    out.layout = RowOwners(torch.cat(owners))
    return out


def seen_both_ways(uses: Iterable[Use]) -> set[str]:
    """Weights that are used as they are stored and transposed: no block has room for both."""
    ways: dict[str, set[Storage]] = defaultdict(set)
    for use in uses:
        if use.weight is not None:
            ways[use.weight.name].add(use.storage)
    return {name for name, own in ways.items() if len(own) > 1}


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
        storage = Storage() if last is None else last.storage
        groups = last.groups if isinstance(last, Convolution) else max(1, storage.stack)
        blocks.append(
            Block(
                name=block_name(name),
                parameters=parameters,
                shapes=tuple(shapes[parameter] for parameter in parameters),
                groups=groups,
                bias_column=not row and len(parameters) == 2,
                row=row,
                transposed=storage.transposed,
                stacked=storage.stack > 0,
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
    for use in joined(uses):
        if use.gradient is not None:
            use.add_to(parts, batch)
    for name, values in generic.items():
        parts.add_dense(name, values)
    return parts.gradients(batch)
