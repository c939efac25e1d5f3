"""From recorded uses of parameters to the per-example gradient of each block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tda_lightning.gradients.blocks import Block, block_name
from tda_lightning.gradients.capture import Ref, Use
from tda_lightning.gradients.composite import Rows, Sum
from tda_lightning.gradients.forms import Dense, Gradient, Outer
from tda_lightning.records.errors import EngineError


def plan_blocks(shapes: dict[str, tuple[int, ...]], uses: Iterable[Use]) -> list[Block]:
    """Group parameters into blocks by how they were used.

    A weight and a bias that are only ever used with each other share a block. A parameter
    without a native use is a block of its own.
    """
    biases, weights = defaultdict(set), defaultdict(set)
    kinds: dict[str, str] = {}
    groups: dict[str, int] = {}
    for use in uses:
        if use.weight is not None:
            if use.bias is not None:
                aligned = (use.weight.start, use.weight.stop) == (use.bias.start, use.bias.stop)
                aligned = aligned and use.weight.height == use.bias.height
                biases[use.weight.name].add(use.bias.name if aligned else "")
                weights[use.bias.name].add(use.weight.name)
            kinds[use.weight.name] = use.kind
            if use.kind == "convolution":
                groups[use.weight.name] = use.saved[5]
        elif use.bias is not None:
            weights[use.bias.name].add("")
    joined = {
        weight: next(iter(names))
        for weight, names in biases.items()
        if len(names) == 1 and "" not in names and weights[next(iter(names))] == {weight}
    }
    partners = set(joined.values())
    blocks = []
    for name, shape in shapes.items():
        if name in partners:
            continue
        parameters = (name, joined[name]) if name in joined else (name,)
        row = kinds.get(name) == "norm" or len(shape) < 2
        blocks.append(
            Block(
                name=block_name(name),
                parameters=parameters,
                shapes=tuple(shapes[parameter] for parameter in parameters),
                groups=groups.get(name, 1),
                bias_column=not row and len(parameters) == 2,
                row=row,
            )
        )
    return blocks


@dataclass
class _Pieces:
    """What was found for one block: outer products, touched rows, dense parts by parameter."""

    outer: list[tuple[Callable[[slice], Tensor], Tensor]]
    rows: list[Rows]
    dense: dict[str, Tensor]


def assemble(
    blocks: Sequence[Block], uses: Sequence[Use], batch: int, generic: dict[str, Tensor]
) -> dict[str, Gradient]:
    """Per-example gradient of every block from the uses and the generic gradients by name."""
    owner = {name: block for block in blocks for name in block.parameters}
    pieces = {block.name: _Pieces([], [], {}) for block in blocks}
    for use in uses:
        if use.gradient is not None:
            _add(use, owner, pieces, batch, skip=generic)
    for name, values in generic.items():
        pieces[owner[name].name].dense[name] = values
    template = next((use.gradient for use in uses if use.gradient is not None), None)
    if template is None:
        template = next(iter(generic.values()), None)
    if template is None:
        raise EngineError(
            "The loss depends on no trained parameter. Check that the task's loss calls the "
            "module that was trained."
        )
    return {block.name: _merge(block, pieces[block.name], batch, template) for block in blocks}


def _add(
    use: Use,
    owner: dict[str, Block],
    pieces: dict[str, _Pieces],
    batch: int,
    skip: Iterable[str],
) -> None:
    weight = use.weight if use.weight is not None and use.weight.name not in skip else None
    bias = use.bias if use.bias is not None and use.bias.name not in skip else None
    if weight is None and bias is None:
        return
    assert use.gradient is not None and use.layout is not None
    if use.kind in ("norm", "elementwise"):
        normal, shape, axes = use.saved
        for ref, product in (
            (weight, use.gradient * normal if weight else None),
            (bias, use.gradient),
        ):
            if ref is not None and product is not None:
                moved = product.movedim(axes, tuple(range(-len(axes), 0)))
                summed = use.layout.batch_first(moved, batch).reshape(batch, -1, *shape).sum(1)
                _accumulate(pieces[owner[ref.name].name].dense, ref.name, summed)
        return
    if use.kind == "embedding":
        assert weight is not None
        index, padding = use.saved
        index = use.layout.batch_first(index, batch).reshape(batch, -1)
        values = use.layout.batch_first(use.gradient, batch).reshape(*index.shape, -1)
        block = owner[weight.name]
        example = torch.arange(batch, device=index.device)[:, None].expand_as(index)
        kept = index != padding if padding is not None else torch.ones_like(index, dtype=torch.bool)
        if block.bias_column:
            values = F.pad(values, (0, 1))
        rows = Rows(example[kept], index[kept], values[kept], batch, block.shape[1])
        pieces[block.name].rows.append(rows)
        return
    outputs = _outputs(use, batch)
    if bias is not None and not (weight is not None and owner[weight.name] is owner[bias.name]):
        summed = _padded(outputs, bias).sum(2).flatten(1)
        _accumulate(pieces[owner[bias.name].name].dense, bias.name, summed)
    if weight is not None:
        block = owner[weight.name]
        column = (0.0 if use.bias is None else 1.0) if block.bias_column else None
        inputs = _inputs(use, batch, column)
        pieces[block.name].outer.append((inputs, _padded(outputs, weight)))


def _outputs(use: Use, batch: int) -> Tensor:
    """Output gradients [batch, groups, positions, rows]."""
    assert use.gradient is not None and use.layout is not None
    gradient = use.layout.batch_first(use.gradient, batch)
    if use.kind == "linear":
        return gradient.reshape(batch, 1, -1, gradient.shape[-1])
    groups, spatial = use.saved[5], len(use.saved[1])
    rows, positions = gradient.shape[-spatial - 1] // groups, gradient.shape[-spatial:].numel()
    split = gradient.reshape(batch, -1, groups, rows, positions)
    return split.permute(0, 2, 1, 4, 3).flatten(2, 3)


def _inputs(use: Use, batch: int, column: float | None) -> Callable[[slice], Tensor]:
    """Layer inputs of a slice of the examples: [chunk, groups, positions, columns].

    ``column`` is the constant input of the bias, as one more column; None without.
    """
    assert use.layout is not None
    if use.kind == "linear":
        flat = use.layout.batch_first(use.saved, batch).reshape(batch, 1, -1, use.saved.shape[-1])
        if column is None:
            return flat.__getitem__
        return lambda rows: F.pad(flat[rows], (0, 1), value=column)
    images, kernel, stride, padding, dilation, groups = use.saved
    spatial = len(kernel)
    images = use.layout.batch_first(images, batch)
    images = images.reshape(batch, -1, *images.shape[-spatial - 1 :])

    def unfolded(rows: slice) -> Tensor:
        chunk = images[rows]
        patches = unfold(chunk.flatten(0, 1), kernel, stride, padding, dilation, groups, column)
        return patches.unflatten(0, chunk.shape[:2]).transpose(1, 2).flatten(2, 3)

    return unfolded


def unfold(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    column: float | None = None,
) -> Tensor:
    """Patches that a convolution multiplies by its weight: [batch, groups, positions, columns].

    Any number of spatial axes; columns are (channels of the group, *kernel), the order of the
    weight's own axes, and ``column`` fills one more at the end.
    """
    if any(padding):
        images = F.pad(images, [side for pad in reversed(padding) for side in (pad, pad)])
    for axis, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True)):
        images = images.unfold(2 + axis, spread * (size - 1) + 1, step)[..., ::spread]
    spatial = len(kernel)
    images = images.unflatten(1, (groups, -1))
    offsets = range(3 + spatial, 3 + 2 * spatial)
    patches = images.permute(0, 1, 2, *offsets, *range(3, 3 + spatial))
    own = patches.shape[2 : 3 + spatial]  # channels of the group, *kernel
    # One copy, positions innermost as in the images: several times faster than columns innermost.
    width = own.numel() + (column is not None)
    filled = patches.new_empty(*patches.shape[:2], width, *patches.shape[-spatial:])
    filled[:, :, : own.numel()].unflatten(2, own).copy_(patches)
    if column is not None:
        filled[:, :, -1] = column
    return filled.flatten(3).transpose(2, 3)


def _padded(outputs: Tensor, ref: Ref) -> Tensor:
    """Zero output gradients for the rows of the parameter that this use did not touch."""
    if (ref.start, ref.stop) == (0, ref.height):
        return outputs
    return F.pad(outputs, (ref.start, ref.height - ref.stop))


def _accumulate(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    sums[name] = sums[name] + values if name in sums else values


def _merge(block: Block, pieces: _Pieces, batch: int, template: Tensor) -> Gradient:
    terms: list[Gradient] = []
    groups, height, width = block.shape
    if pieces.outer:
        outputs = pieces.outer[0][1]
        if len(pieces.outer) > 1:
            outputs = torch.cat([outputs for _, outputs in pieces.outer], dim=2)
        if outputs.shape[1:2] + outputs.shape[3:] != (groups, height):
            raise EngineError(
                f"Parameter {block.parameters[0]} is used by layers that see it in different "
                "shapes. Give them separate parameters."
            )
        terms.append(Outer(_joined([inputs for inputs, _ in pieces.outer]), outputs, width))
    terms += pieces.rows
    if pieces.dense:
        filled = {
            name: pieces.dense[name] if name in pieces.dense else template.new_zeros(batch, *shape)
            for name, shape in zip(block.parameters, block.shapes, strict=True)
        }
        terms.append(Dense(block.matrix(filled)))
    if not terms:
        return Dense(template.new_zeros(()).expand(batch, *block.shape))
    return terms[0] if len(terms) == 1 else Sum(terms)


def _joined(parts: list[Callable[[slice], Tensor]]) -> Callable[[slice], Tensor]:
    if len(parts) == 1:
        return parts[0]
    return lambda rows: torch.cat([part(rows) for part in parts], dim=2)
