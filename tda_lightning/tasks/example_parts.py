r"""What each example contributes to the loss of a batch, read off the graph of a training step.

The loss of example n is what makes the batch's loss, differentiated with respect to the example's
weight, come out as trained (docs/methods.md, "The loss of an example"):

.. math::
    c_n = \frac{\partial L_B}{\partial w_n}, \qquad
    L_B(w) \text{ with each example's terms times } w_n
    \text{ where they are summed or averaged over examples}

:class:`Reader` walks the graph from the loss backwards to the sums and means over the examples.
Behind them the terms are those of single examples; before them stand few operations on numbers,
through which it carries one tangent for each example. What depends on no data (a penalty on the
weights) has none. What a mean divides by is a *mass*: it is not weighted, and it differs between
batches where it counts tokens or adds up class weights.

Which tensors hold examples and which divisors are masses is learned before (``step_layout.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from tda_lightning.tasks.step_graph import Node, call_again

Key: TypeAlias = tuple[object, ...]
Site: TypeAlias = tuple[Key, int]  # of a mass: its key, and which of them it is in the step
Divide: TypeAlias = Literal["own", "held", "each"]

_SUMS = {"sum", "mean"}
_PRODUCTS = {"dot", "vdot", "inner", "matmul", "rmatmul"}
_BOUNDS = {"clamp", "clamp_min", "maximum", "to", "float", "double"}
_ADDITIONS = {"add", "radd", "sub", "rsub"}
FACTORS = {"mul", "rmul", "div"}
_SHAPES = {
    "clone", "contiguous", "double", "expand", "flatten", "float", "getitem", "movedim", "mT", "T",
    "permute", "reshape", "select", "squeeze", "to", "transpose", "type", "unsqueeze", "view",
    "neg", "unbind", "split", "chunk", "sum", "mean", "half", "bfloat16",
}  # fmt: skip


class UnreadableLossError(Exception):
    """The loss cannot be taken apart in a batch; its examples must be run one by one."""


@dataclass(frozen=True)
class Axis:
    """Where the examples are in a tensor: along ``axis``, the rows of an example next to one
    another (``together``), or one position of all examples after the other."""

    axis: int
    together: bool

    def rows(self, values: Tensor, batch: int) -> Tensor:
        """[batch, *shape], with the example's own rows where the axis was."""
        count = values.shape[self.axis] // batch
        if self.together:
            return values.unflatten(self.axis, (batch, count)).movedim(self.axis, 0)
        return values.unflatten(self.axis, (count, batch)).movedim(self.axis + 1, 0)


@dataclass
class Layout:
    """What was learned of a step.

    Attributes:
        axes: where tensors hold examples, by where they are summed; None: they hold none.
        masses: whether a divisor is a mass, by place.
        factors: which operand of a product is its factor, by place; None: both are parts.
        constants: places of factors that are numbers, with the numbers.
        uneven: places of divisors that differ between examples.
        wholes_are_means: of examples that are run alone, whether a value that is no sum is averaged
            over the batch rather than summed.
    """

    axes: dict[Key, Axis | None] = field(default_factory=dict)
    masses: dict[Key, bool] = field(default_factory=dict)
    factors: dict[Key, int | None] = field(default_factory=dict)
    constants: set[tuple[Key, object]] = field(default_factory=set)
    uneven: set[Key] = field(default_factory=set)
    wholes_are_means: bool = False


@dataclass(frozen=True)
class Mass:
    """What a mean divides by in one batch.

    Attributes:
        total: of the batch.
        each: of its examples, [batch]; None where that is not known.
        counts: how many terms of each example it counts, [batch].
    """

    total: Tensor
    each: Tensor | None
    counts: Tensor | None


@dataclass(frozen=True)
class Average:
    """A mass per example over many batches, and per term that it counts."""

    per_example: float
    per_term: float


@dataclass(frozen=True)
class Part:
    """The derivative of a tensor with respect to each example's weight: [batch, *shape].

    ``divided``: by a mass, so that it belongs to a mean rather than a sum over the batch.
    """

    values: Tensor
    divided: bool


class Reader:
    """Reads the contributions of examples off a graph.

    Args:
        batch: number of examples.
        layout: as learned; None: the batch axis leads everywhere, and no divisor is a mass.
        divide: what takes the place of a mass. ``"own"``: itself. ``"held"``: its average for an
            example, so that an example's loss is the same in every batch. ``"each"``: the
            example's own number of terms times the average of a term, for measurements.
        averages: of the masses.
        alone: the batch is one example, and everything that depends on data is its own.

    Attributes:
        masses: met on the way.
        moved: whether terms are of rows that data put where they are.
    """

    def __init__(
        self,
        batch: int,
        layout: Layout | None = None,
        divide: Divide = "own",
        averages: Mapping[Site, Average] | None = None,
        alone: bool = False,
    ) -> None:
        self.batch, self.layout, self.divide, self.alone = batch, layout, divide, alone
        self.averages = averages or {}
        self.masses: dict[Site, Mass] = {}
        self.moved = False
        self._met: Counter[Key] = Counter()
        self._read: dict[int, list[Part]] = {}

    def read(self, total: Node) -> list[Part]:
        """The parts of the loss, one for means and one for sums over the batch at most."""
        return self._parts(total)

    def _parts(self, node: Node) -> list[Part]:
        if not node.of_data:
            return []
        if id(node) not in self._read:
            self._read[id(node)] = _gathered(self._parts_of(node))
        return self._read[id(node)]

    def _parts_of(self, node: Node) -> list[Part]:
        if node.func is None:
            return self._whole(node)
        if node.name in _ADDITIONS:
            return self._of_addition(node)
        if node.name in FACTORS:
            return self._of_factor(node)
        if (terms := summed_terms(node)) is not None and self.holds_examples(terms):
            return [self._sum(node, terms)]
        if node.name == "stack":
            return self._of_stack(node)
        if self.alone and node.name not in _SHAPES:
            return self._whole(node)
        parts = []
        for number, operand in enumerate(node.inputs):
            for part in self._parts(operand):
                values = _along(node, number, part.values, linear=node.name in _SHAPES)
                parts.append(Part(values, part.divided))
        if not parts:
            return self._whole(node)
        return parts

    def _whole(self, node: Node) -> list[Part]:
        """Of what nothing is known but its value."""
        if not node.value.is_floating_point():
            return []
        if self.alone:
            part = Part(node.value[None], False)
            if self.layout is None or not self.layout.wholes_are_means:
                return [part]
            one = node.value.new_ones(1)
            return [self._divide(part, (node.name,), Mass(one.sum(), one, one))]
        if node.value.requires_grad:
            raise UnreadableLossError(f"{node.name or 'a tensor from elsewhere'} is not a sum")
        return []

    def _of_addition(self, node: Node) -> list[Part]:
        alpha = node.kwargs.get("alpha", 1)
        signs = {"add": (1, alpha), "radd": (1, 1), "sub": (1, -alpha), "rsub": (-alpha, 1)}
        parts = []
        # A sum of many terms is deep on its left: go down without recursion.
        pending = [(node, 1.0)]
        while pending:
            current, factor = pending.pop()
            if current.name != node.name or current.func is None or not current.of_data:
                for part in self._parts(current):
                    parts.append(Part(_expanded(part.values * factor, node.value), part.divided))
                continue
            for operand, sign in zip(current.args[:2], signs[node.name], strict=True):
                if isinstance(operand, Node) and operand.of_data:
                    pending.append((operand, factor * sign))
        return parts

    def _of_factor(self, node: Node) -> list[Part]:
        first, second = node.args[:2]
        key = place(node)
        factor = self._factor(node, key)
        parts = []
        if factor is not None:
            numerator, divisor = (first, second)[1 - factor], (first, second)[factor]
            inner = self._parts(numerator) if isinstance(numerator, Node) else []
            value = divisor.value if isinstance(divisor, Node) else divisor
            if self.layout is not None and self._is_mass(node, key, value):
                mass = value if node.name == "div" else 1 / value
                shared = isinstance(mass, Tensor) or key in self.layout.uneven
                each, counts = self._each(divisor if node.name == "div" else None, mass, shared)
                total = torch.as_tensor(mass)
                return [self._divide(part, key, Mass(total, each, counts)) for part in inner]
            for part in inner:
                over = part.values / value if node.name == "div" else part.values * value
                parts.append(Part(_expanded(over, node.value), part.divided))
            if parts:
                return parts
        for number, operand in enumerate(node.inputs):
            for part in self._parts(operand):
                parts.append(Part(_along(node, number, part.values), part.divided))
        return parts

    def _is_mass(self, node: Node, key: Key, value: object) -> bool:
        assert self.layout is not None
        if node.by_mass:
            return True
        known = self.layout.masses.get(key, False)
        if isinstance(value, Tensor) or (key, value) not in self.layout.constants:
            return known
        if known and self.batch > 1 and value in (self.batch, 1 / self.batch):
            raise UnreadableLossError("a factor is the number of examples by chance")
        return False

    def _factor(self, node: Node, key: Key) -> int | None:
        """Which operand is a factor of the other's sum."""
        if self.layout is not None and key in self.layout.factors:
            return self.layout.factors[key]
        return factor_of(node)

    def _of_stack(self, node: Node) -> list[Part]:
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        axis = axis % node.value.dim() + 1
        inner = [self._parts(operand) for operand in node.inputs]
        stacked = []
        for divided in (False, True):
            if not any(part.divided == divided for parts in inner for part in parts):
                continue
            rows = []
            for operand, parts in zip(node.inputs, inner, strict=True):
                own = [part.values for part in parts if part.divided == divided]
                zeros = operand.value.new_zeros(self.batch, *operand.value.shape)
                rows.append(own[0] if own else zeros)
            stacked.append(Part(torch.stack(rows, axis), divided))
        return stacked

    # Sums over examples.

    def holds_examples(self, terms: Terms) -> bool:
        """Whether the sum goes over examples."""
        return self.alone or self._axis(terms) is not None

    def _axis(self, terms: Terms) -> Axis | None:
        if self.layout is not None and terms.key in self.layout.axes:
            return self.layout.axes[terms.key]
        if self.layout is not None:
            raise UnreadableLossError(f"a {terms.key[0]} of {terms.key[1]} was not met before")
        values = terms.values
        leads = values.dim() > 0 and values.shape[0] % self.batch == 0
        return Axis(0, True) if leads else None

    def rows(self, terms: Terms, values: Tensor) -> Tensor:
        """Values like the terms, by example: [batch, *shape]."""
        if self.alone:
            return values[None]
        axis = self._axis(terms)
        assert axis is not None
        if values.shape[axis.axis] % self.batch:
            raise UnreadableLossError(
                f"{terms.key[1]} of shape {list(values.shape)} is not that of {self.batch} examples"
            )
        return axis.rows(values, self.batch)

    def _sum(self, node: Node, terms: Terms) -> Part:
        """The terms of each example, summed as the node sums all."""
        self.moved |= terms.node.moved
        part = Part(terms.sum(self.rows(terms, terms.values)), False)
        if node.name != "mean":
            return part
        if terms.counted is None:
            counts = part.values.new_full((self.batch,), terms.number / self.batch)
        else:
            counts = terms.sum(self.rows(terms, terms.counted.to(terms.values)))
        return self._divide(part, terms.key, Mass(counts.sum(), counts, counts))

    def _each(
        self, divisor: object, mass: Tensor | float, shared: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """A mass by example, and the number of its terms that are not zero; None where a number
        is ``shared`` by examples that have different parts in it."""
        each: Tensor | None = None
        if self.alone or self.batch == 1:
            each = torch.as_tensor(mass)[None]
        elif not shared:
            each = (torch.as_tensor(mass) / self.batch).expand(self.batch)
        if not isinstance(divisor, Node):
            return each, each
        inner = Reader(self.batch, self.layout, alone=self.alone)
        try:
            parts = inner.read(divisor)
            while (terms := summed_terms(divisor)) is None and divisor.name in _BOUNDS:
                divisor = divisor.inputs[0]
            counts = None
            if terms is not None and inner.holds_examples(terms):
                counts = terms.sum(inner.rows(terms, (terms.values != 0).to(terms.values)))
        except (UnreadableLossError, RuntimeError):
            return None, None
        return (parts[0].values if len(parts) == 1 else None), counts

    def _divide(self, part: Part, key: Key, mass: Mass) -> Part:
        site = (key, self._met[key])
        self._met[key] += 1
        self.masses[site] = mass
        divisor = mass.total
        average = self.averages.get(site)
        if self.divide != "own" and not part.divided and average is not None:
            divisor = torch.tensor(average.per_example, dtype=torch.float64)
            if self.divide == "each" and mass.counts is not None:
                divisor = mass.counts.double().clamp(min=1) * average.per_term
        elif self.divide != "own" and not part.divided:
            raise UnreadableLossError(f"a {key[0]} was not met before")
        divisor = divisor.to(part.values)
        if divisor.dim():
            missing = part.values.dim() - divisor.dim()
            divisor = divisor.reshape(*divisor.shape[:1], *[1] * missing, *divisor.shape[1:])
        return Part(part.values / divisor, True)


@dataclass(frozen=True)
class Terms:
    """What a sum or a mean goes over.

    Attributes:
        key: of the place in the step.
        node: whose value holds the terms, or held them before a mask chose some.
        values: the terms.
        counted: whether a mask leaves the term in; None where there is no mask.
        dims: that are summed; None for all.
    """

    key: Key
    node: Node
    values: Tensor
    counted: Tensor | None
    dims: tuple[int, ...] | None
    keepdim: bool

    @property
    def number(self) -> int:
        """How many terms each element of the result is of."""
        shape = self.values.shape
        return math.prod(shape if self.dims is None else [shape[dim] for dim in self.dims])

    def sum(self, rows: Tensor) -> Tensor:
        """Sums of ``rows`` [batch, *shape of the terms] over the terms: [batch, ...]."""
        if self.dims is None:
            return rows.flatten(1).sum(1) if rows.dim() > 1 else rows
        dims = [dim % (rows.dim() - 1) + 1 for dim in self.dims]
        return rows.sum(dims, keepdim=self.keepdim)


def summed_terms(node: Node) -> Terms | None:
    """The terms that a node sums; None for another operation."""
    if node.name in _PRODUCTS and len(node.inputs) == 2:
        left, right = (operand.value for operand in node.inputs)
        if left.dim() != 1 or right.dim() != 1:
            return None
        source = next((operand for operand in node.inputs if operand.of_data), node.inputs[0])
        product = left * right
        key = (node.name, source.name, 1)
        return Terms(key, source, product, None, None, False)
    if node.name not in _SUMS or not node.inputs:
        return None
    source = node.inputs[0]
    values = source.value
    dims = _dims(node)
    keepdim = bool(node.kwargs.get("keepdim", False))
    masked = _mask(source)
    if masked is not None:
        base, mask = masked
        shaped = mask.reshape(mask.shape + (1,) * (base.value.dim() - mask.dim()))
        key = (node.name, f"masked {base.name}", base.value.dim())
        if dims is not None and set(dims) != set(range(values.dim())):
            return None
        counted = shaped.expand_as(base.value)
        return Terms(key, base, base.value.where(counted, 0), counted, None, False)
    if not values.is_floating_point():
        values = values.to(torch.get_default_dtype())
    return Terms((node.name, source.name, values.dim(), dims), source, values, None, dims, keepdim)


def factor_of(node: Node) -> int | None:
    """Which operand of a product is a number, or has no gradient beside one that has; None where
    both are parts of the loss."""
    if node.name == "div":
        return 1
    first, second = node.args[:2]
    for number, (operand, other) in enumerate(((first, second), (second, first))):
        if not isinstance(operand, Node):
            return number
        if not operand.of_data and isinstance(other, Node) and other.of_data:
            return number
        if isinstance(other, Node) and other.value.requires_grad > operand.value.requires_grad:
            return number
    return None


def _gathered(parts: Sequence[Part]) -> list[Part]:
    """Parts of a kind in one."""
    out = []
    for divided in (False, True):
        own = [part.values for part in parts if part.divided == divided]
        if own:
            out.append(Part(sum(own[1:], start=own[0]), divided))
    return out


def _along(node: Node, number: int, tangents: Tensor, linear: bool = False) -> Tensor:
    """The derivative of a node along tangents [batch, *shape] of one of its inputs."""
    if node.name == "setitem":
        raise UnreadableLossError("the loss is written into a tensor")

    def again(value: Tensor) -> Tensor:
        return call_again(node, {number: value})

    if linear:
        return torch.func.vmap(again)(tangents)
    primal = node.inputs[number].value
    return torch.func.vmap(lambda t: torch.func.jvp(again, (primal,), (t,))[1])(tangents.to(primal))


def _expanded(part: Tensor, value: Tensor) -> Tensor:
    """Tangents [batch, *smaller shape] broadcast to those of a tensor like ``value``."""
    missing = value.dim() - (part.dim() - 1)
    part = part.reshape(part.shape[0], *[1] * missing, *part.shape[1:])
    return part.expand(part.shape[0], *value.shape)


def place(node: Node) -> Key:
    """Where a factor stands in a step, as far as that can be told."""
    return node.name, _source(node.args[0]), _source(node.args[1]), node.by_mass


def _source(operand: object) -> object:
    return operand.name if isinstance(operand, Node) else type(operand).__name__


def _dims(node: Node) -> tuple[int, ...] | None:
    given = node.kwargs.get("dim", node.kwargs.get("axis"))
    if given is None and len(node.args) > 1:
        given = node.args[1:] if isinstance(node.args[1], int) else node.args[1]
    if given is None or (isinstance(given, (tuple, list)) and not given):
        return None
    dims = (given,) if isinstance(given, int) else tuple(d for d in given if type(d) is int)
    return tuple(dim % node.inputs[0].value.dim() for dim in dims)


def _mask(node: Node) -> tuple[Node, Tensor] | None:
    """Of a choice by a mask: what is chosen from, and the mask."""
    if node.name not in ("getitem", "masked_select") or len(node.inputs) != 2:
        return None
    base, mask = node.inputs
    if mask.value.dtype != torch.bool or node.args[0] is not base or node.args[1] is not mask:
        return None
    fits = mask.value.dim() and mask.value.shape == base.value.shape[: mask.value.dim()]
    return (base, mask.value) if fits and base.value.is_floating_point() else None
