"""Where a training step holds examples, and which of its divisors are masses: learned from a batch
and from its examples alone, before ``example_parts.py`` reads any other batch by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tda_lightning.tasks.example_parts import (
    FACTORS,
    Axis,
    Key,
    Layout,
    Terms,
    UnreadableLossError,
    factor_of,
    place,
    summed_terms,
)
from tda_lightning.tasks.step_graph import Node

T = TypeVar("T")


def learn_layout(whole: Node, alone: Sequence[Node], same_values: bool = True) -> Layout:
    """What stands where in a step, from a batch's loss and those of its examples alone.

    Args:
        same_values: whether an example's terms are the same alone and in its batch.

    Raises:
        UnreadableLossError: the step does other things for one example than for several, or the
            terms of an example in the batch are not those that it has alone.
    """
    learner = _Learner(len(alone), same_values)
    learner.learn(whole, alone)
    return learner.layout


def learn_masses(alone: Sequence[Node]) -> Layout:
    """Which divisors are masses in a step that is run for examples one by one: those that differ
    between examples, or are 1, the number of examples."""
    layout = Layout()
    pending = [list(alone)]
    while pending:
        nodes = pending.pop()
        node = nodes[0]
        if not node.of_data or node.func is None or summed_terms(node) is not None:
            continue
        if any((other.name, len(other.inputs)) != (node.name, len(node.inputs)) for other in nodes):
            continue
        if node.name in FACTORS and (number := factor_of(node)) is not None:
            key, divisors = place(node), [_number(other, number) for other in nodes]
            differ = any(not _alike(divisors[0], other) for other in divisors)
            if differ or bool((divisors[0] == 1).all()):
                layout.masses[key] = True
            elif not isinstance(node.args[number], Node):
                layout.constants.add((key, node.args[number]))
            else:
                layout.masses.setdefault(key, False)
        for number in range(len(node.inputs)):
            pending.append([other.inputs[number] for other in nodes])
    return layout


class _Learner:
    def __init__(self, batch: int, same_values: bool) -> None:
        self.batch, self.same_values = batch, same_values
        self.layout = Layout()
        self._seen: set[int] = set()

    def learn(self, whole: Node, alone: Sequence[Node]) -> None:
        pending = [(whole, list(alone))]
        while pending:
            node, others = pending.pop()
            if not node.of_data or id(node) in self._seen:
                continue
            if node.func is None:
                if node.value.requires_grad:
                    raise UnreadableLossError("an operation is none that torch shows")
                continue
            self._seen.add(id(node))
            if any((o.name, len(o.inputs)) != (node.name, len(node.inputs)) for o in others):
                raise UnreadableLossError("one example alone takes other operations")
            if (terms := summed_terms(node)) is not None:
                single = [summed_terms(other) for other in others]
                if any(other is None or other.key != terms.key for other in single):
                    raise UnreadableLossError("one example alone is summed otherwise")
                axis = self._axis(terms, [other for other in single if other is not None])
                self._set(self.layout.axes, terms.key, axis)
                if axis is not None:
                    continue
            if node.name in FACTORS:
                self._learn_factor(node, others)
            for number, operand in enumerate(node.inputs):
                shapes = {other.inputs[number].value.shape for other in others}
                if operand.of_data and shapes != {operand.value.shape}:
                    raise UnreadableLossError(f"{node.name} goes over the examples")
            for number, operand in enumerate(node.inputs):
                pending.append((operand, [other.inputs[number] for other in others]))

    def _learn_factor(self, node: Node, others: Sequence[Node]) -> None:
        key = place(node)
        number = factor_of(node)
        self._set(self.layout.factors, key, number)
        if number is None:
            return
        divisor = node.args[number]
        own, *alone = (_number(item, number) for item in (node, *others))
        if self.batch == 1:  # what comes from the data, or is the number of examples
            counts = isinstance(divisor, Node) or bool((own == 1).all())
            self._set(self.layout.masses, key, counts)
            return
        constant = all(_alike(own, value) for value in alone)
        if any(not _alike(alone[0], value) for value in alone):
            self.layout.uneven.add(key)
        additive = not constant and all(v.shape == own.shape for v in alone)
        additive = additive and torch.allclose(own, torch.stack(alone).sum(0), rtol=1e-5, atol=0)
        if constant and not isinstance(divisor, Node):
            self.layout.constants.add((key, divisor))
            return
        self._set(self.layout.masses, key, additive)

    def _axis(self, terms: Terms, alone: Sequence[Terms]) -> Axis | None:
        """Where the terms hold examples; None where they hold none."""
        shape, single = terms.values.shape, [other.values.shape for other in alone]
        if any(len(other) != len(shape) for other in single):
            raise UnreadableLossError("one example alone has terms of other dimensions")
        if all(other == shape for other in single) and (self.batch > 1 or not shape):
            return None
        for axis in range(len(shape)):
            rest = shape[:axis] + shape[axis + 1 :]
            if all(
                other[axis] * self.batch == shape[axis] and other[:axis] + other[axis + 1 :] == rest
                for other in single
            ):
                for together in (True, False):
                    candidate = Axis(axis, together)
                    rows = candidate.rows(terms.values.detach(), self.batch)
                    own = torch.stack([other.values.detach() for other in alone])
                    if not self.same_values or _alike(rows, own):
                        return candidate
                raise UnreadableLossError("an example's terms differ alone and in its batch")
        raise UnreadableLossError("the numbers of terms are not those of so many examples")

    def _set(self, known: dict[Key, T], key: Key, value: T) -> None:
        if known.setdefault(key, value) != value:
            raise UnreadableLossError("two places of the step look the same and differ")


def _number(node: Node, operand: int) -> Tensor:
    """What a factor divides by."""
    given = node.args[operand]
    value = torch.as_tensor(given.value if isinstance(given, Node) else given).detach().double()
    return value if node.name == "div" else 1 / value


def _alike(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    eps = [torch.finfo(t.dtype).eps for t in (left, right) if t.is_floating_point()]
    scale = float(right.detach().abs().nan_to_num(posinf=0).max()) if right.numel() else 0.0
    tolerance = max(eps, default=0.0) ** 0.6
    return torch.allclose(
        left.double(), right.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )
