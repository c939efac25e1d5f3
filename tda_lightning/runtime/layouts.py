"""Where the examples are in a batch, told by comparison with batches of one.

``collate([dataset[i]])`` is the batch of one that a loader makes by its own means. A tensor that
holds the examples along an axis has the length 1 there, whatever its other axes; a tensor that is
the same in both belongs to no example, even if it happens to be as long as the batch. So the batch
is compared with the batches of one of all its examples, and its parts are cut as they show.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from tda_lightning.runtime.structures import (
    close,
    parts,
    same,
    same_arrays,
    tensors,
    with_parts,
)

Kind = Literal["shared", "axis", "items", "packed", "count", "inside", "unknown"]


@dataclass(frozen=True)
class Rule:
    """How a part of a batch is cut.

    Attributes:
        kind: "shared", the same for every example; "axis", along one of its axes; "items", a
            sequence of examples; "packed", a packed sequence of them; "count", their number;
            "inside", by the rules of its parts; "unknown", not at all.
        axis: of the examples.
        inside: rules of the parts, by key.
    """

    kind: Kind
    axis: int = 0
    inside: Mapping[object, Rule] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether every part can be cut."""
        return self.kind != "unknown" and all(rule.whole for rule in self.inside.values())


_OTHER = "The batch is laid out otherwise than the one that its layout was seen on."


def merged(one: Rule, other: Rule) -> Rule:
    """The rule for two batches of one structure: what they do not agree on is unknown."""
    if (one.kind, one.axis) != (other.kind, other.axis) or one.inside.keys() != other.inside.keys():
        return Rule("unknown")
    inside = {key: merged(rule, other.inside[key]) for key, rule in one.inside.items()}
    return Rule(one.kind, one.axis, inside)


class CannotCut(ValueError):
    """A batch that its layout does not fit."""


def learned(batch: Any, alone: Sequence[Any]) -> Rule:
    """The rule of a batch of at least two examples.

    Args:
        alone: the batch of one of each of its examples, in order.
    """
    count = len(alone)
    if any(type(one) is not type(batch) for one in alone):
        return Rule("unknown")
    if isinstance(batch, PackedSequence):
        return Rule("packed")
    if isinstance(batch, (Tensor, np.ndarray)):
        return _rule_of_array(batch, alone)
    inside, others = parts(batch), [parts(one) for one in alone]
    if inside is None:
        if _counts(batch, alone):
            return Rule("count")
        number = isinstance(batch, (int, float))  # it is compared later
        return Rule("shared" if number or all(same(batch, one) for one in alone) else "unknown")
    each = [other or {} for other in others]
    if all(other.keys() == inside.keys() for other in each):
        return Rule(
            "inside",
            inside={key: learned(inside[key], [other[key] for other in each]) for key in inside},
        )
    lengths = {len(other) for other in each}
    if isinstance(batch, (list, tuple)) and len(inside) == count and lengths == {1}:
        return Rule("items")
    return Rule("unknown")


def _rule_of_array(batch: Any, alone: Sequence[Any]) -> Rule:
    if isinstance(batch, Tensor) and batch.is_nested:
        return Rule("unknown")
    shape, shapes = tuple(batch.shape), [tuple(one.shape) for one in alone]
    if any(len(other) != len(shape) for other in shapes):
        return Rule("unknown")
    if any(one.dtype != batch.dtype for one in alone):
        return Rule("unknown")
    if not shape and _counts(batch, alone):
        return Rule("count")
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    own = [
        axis
        for axis, size in enumerate(shape)
        if size == len(alone) and all(other[axis] == 1 for other in shapes)
    ]
    for axis in own:
        others = [(n, m) for e, (n, m) in enumerate(zip(shape, longest, strict=True)) if e != axis]
        # Padded to the longest example; or cut short, which will show in the values.
        if all(n == m for n, m in others) or any(n < m for n, m in others):
            return Rule("axis", axis)
    return Rule("shared" if list(shape) == longest else "unknown")


def _counts(number: Any, alone: Sequence[Any]) -> bool:
    """Whether it is the number of examples, in the batch and in the batches of one."""
    try:
        whole = int(number) == number == len(alone)
        return whole and all(int(one) == one == 1 for one in alone)
    except (TypeError, ValueError):
        return False


def first_axis(batch: Any, count: int) -> Rule:
    """The rule of a batch whose tensors all hold the examples along their first axis."""
    if isinstance(batch, Tensor) and batch.is_nested:
        return Rule("unknown")
    if isinstance(batch, (Tensor, np.ndarray)):
        return Rule("axis") if batch.ndim and len(batch) == count else Rule("shared")
    inside = parts(batch)
    if inside is None:
        return Rule("packed" if isinstance(batch, PackedSequence) else "shared")
    plain = isinstance(batch, (list, tuple)) and len(batch) == count
    if plain and all(isinstance(value, (str, int, float)) for value in batch):
        return Rule("items")
    return Rule("inside", inside={key: first_axis(part, count) for key, part in inside.items()})


def cut(rule: Rule, batch: Any, position: int, count: int) -> Any:
    """The example at ``position`` of a batch of ``count``, as a batch of one.

    Raises:
        CannotCut: the batch is laid out otherwise.
    """
    if rule.kind == "shared":
        return batch
    if rule.kind == "axis":
        _require(batch.ndim > rule.axis and batch.shape[rule.axis] == count)
        if isinstance(batch, Tensor) and batch.layout != torch.strided:
            place = torch.tensor([position], device=batch.device)
            return batch.index_select(rule.axis, place)
        if isinstance(batch, Tensor):
            return batch.narrow(rule.axis, position, 1)
        return batch[(slice(None),) * rule.axis + (slice(position, position + 1),)]
    if rule.kind == "count":
        return type(batch)(1) if isinstance(batch, (int, float)) else batch * 0 + 1
    if rule.kind == "items":
        _require(len(batch) == count)
        return type(batch)([batch[position]])
    if rule.kind == "packed":
        sequences = unpack_sequence(batch)
        _require(len(sequences) == count)
        return pack_sequence([sequences[position]], enforce_sorted=batch.sorted_indices is None)
    _require(rule.kind == "inside")
    inside = parts(batch)
    if inside is None or inside.keys() != rule.inside.keys():
        raise CannotCut(_OTHER)
    return with_parts(
        batch, {key: cut(rule.inside[key], part, position, count) for key, part in inside.items()}
    )


def _require(fits: bool) -> None:
    if not fits:
        raise CannotCut(_OTHER)


def stacked(rule: Rule, batch: Any, count: int) -> list[tuple[Any, int | None]]:
    """The leaves of a batch with the axis of their examples, None for what they share.

    Raises:
        CannotCut: some examples are no slices of tensors.
    """
    if rule.kind == "shared":
        return [(batch, None)]
    if rule.kind == "axis" and isinstance(batch, Tensor) and batch.layout == torch.strided:
        _require(batch.ndim > rule.axis and batch.shape[rule.axis] == count)
        return [(batch, rule.axis)]
    inside = parts(batch)
    if rule.kind != "inside" or inside is None or inside.keys() != rule.inside.keys():
        raise CannotCut("The examples of this batch are no slices of tensors.")
    return [leaf for key, part in inside.items() for leaf in stacked(rule.inside[key], part, count)]


def unstacked(rule: Rule, batch: Any, leaves: Iterator[Any]) -> Any:
    """The batch of one whose leaves are slices of those of :func:`stacked`."""
    if rule.kind == "shared":
        return next(leaves)
    if rule.kind == "axis":
        return next(leaves).unsqueeze(rule.axis)
    inside = parts(batch) or {}
    return with_parts(
        batch, {key: unstacked(rule.inside[key], part, leaves) for key, part in inside.items()}
    )


def misfit(rule: Rule, batch: Any, position: int, alone: Any) -> str | None:
    """Where the example at ``position`` differs from its batch of one; None: nowhere, up to padding
    and to parts that cannot be cut. Where there are such, what seems shared counts for nothing: it
    may be of the same length by chance."""
    if not rule.whole:
        rule = _rows_alone(rule)
    return _misfit(rule, batch, position, alone, (_sizes(batch), _sizes(alone)), "")


def _rows_alone(rule: Rule) -> Rule:
    if rule.kind == "shared":
        return Rule("unknown")
    return Rule(rule.kind, rule.axis, {key: _rows_alone(part) for key, part in rule.inside.items()})


def _misfit(
    rule: Rule, batch: Any, position: int, alone: Any, sizes: tuple[set[int], set[int]], path: str
) -> str | None:
    if rule.kind in ("unknown", "count"):
        return None
    if rule.kind == "inside":
        there, here = parts(alone) or {}, parts(batch) or {}
        for key, inner in rule.inside.items():
            inside = f"{path}[{key!r}]"
            found = _misfit(inner, here[key], position, there[key], sizes, inside)
            if found is not None:
                return found
        return None
    if rule.kind == "items":
        agrees = same(batch[position], alone[0])
    elif rule.kind == "packed":
        agrees = same(unpack_sequence(batch)[position], unpack_sequence(alone)[0])
    elif rule.kind == "axis":
        own = cut(rule, batch, position, batch.shape[rule.axis])
        agrees = _same_but_for_padding(own, alone)
    elif isinstance(batch, (Tensor, np.ndarray)) and batch.ndim:
        agrees = _same_but_for_padding(batch, alone)
    else:
        agrees = same(batch, alone) or _are_sizes(batch, alone, sizes)
    return None if agrees else path or "the batch"


def _same_but_for_padding(padded: Any, alone: Any) -> bool:
    """Whether ``padded`` begins or ends with ``alone`` along each axis."""
    places = [_ends(size, wanted) for size, wanted in zip(padded.shape, alone.shape, strict=True)]
    if isinstance(padded, Tensor) and padded.layout != torch.strided:
        padded, alone = padded.to_dense(), alone.to_dense()
    equal = close if isinstance(padded, Tensor) else same_arrays
    return any(equal(padded[place], alone) for place in itertools.product(*places))


def _ends(size: int, wanted: int) -> list[slice]:
    if size == wanted:
        return [slice(None)]
    return [slice(0, wanted), slice(size - wanted, size)]


def _sizes(batch: Any) -> set[int]:
    return {size for one in tensors(batch) if not one.is_nested for size in one.shape}


def _are_sizes(one: Any, alone: Any, sizes: tuple[set[int], set[int]]) -> bool:
    """Whether two numbers are lengths of axes, each in its own batch: what was padded to."""
    try:
        return int(one) in sizes[0] and int(alone) in sizes[1]
    except (TypeError, ValueError):
        return False


def order_of(rule: Rule, batch: Any, alone: Sequence[Any]) -> list[int] | None:
    """Which example stands at each position of a batch, if its rows are the batches of one in some
    order; None if they are not."""
    left, order = list(range(len(alone))), []
    for position in range(len(alone)):
        fits = [n for n in left if misfit(rule, batch, position, alone[n]) is None]
        if not fits:
            return None
        order.append(position if position in fits else fits[0])
        left.remove(order[-1])
    return order


def signature(batch: Any) -> object:
    """The structure of a batch: what its layout is remembered by."""
    if isinstance(batch, (Tensor, np.ndarray)):
        kind = batch.is_floating_point() if isinstance(batch, Tensor) else batch.dtype.kind == "f"
        return (type(batch), batch.ndim, kind)
    inside = parts(batch)
    if inside is None:
        return type(batch)
    each = {key: signature(part) for key, part in inside.items()}
    if isinstance(batch, (list, tuple)) and len(set(each.values())) == 1:
        return (type(batch), *set(each.values()))  # however many
    return (type(batch), tuple(each.items()))
