"""What attribution must know of an optimizer: one record, the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

# A number for a whole parameter, or a tensor where its elements differ.
Number: TypeAlias = "float | Tensor"
Settings: TypeAlias = "Mapping[str, float]"
States: TypeAlias = "Mapping[str, Tensor]"

STEP_COUNT = "step"  # torch.optim's name for how often it has stepped a parameter
WEIGHT_DECAY = "weight_decay"


@dataclass(frozen=True)
class ParameterStep:
    """One recorded step of one parameter, which an adjoint is taken at.

    Attributes:
        rate: the applied learning rate.
        settings: hyper-parameters by column of the steps table.
        gradient: as the optimizer's arithmetic sees it: clipped, with coupled weight decay. Empty
            for a rule that does not read it.
        states: the rule's ``reads`` after the step, where the optimizer has them.
        count: how often the optimizer has stepped the parameter, this step included; 0 where it
            does not count.
        new_states: names of the states that began with this step.
    """

    rate: Number
    settings: Mapping[str, Number]
    gradient: Tensor
    states: States
    count: Number = 0
    new_states: frozenset[str] = frozenset()


Adjoint: TypeAlias = "Callable[[Tensor, dict[str, Tensor], ParameterStep], Tensor]"
Advance: TypeAlias = "Callable[[States, Tensor, Settings], dict[str, Tensor]]"
Metric: TypeAlias = "Callable[[States, Settings, Number], Tensor]"
Squares: TypeAlias = "Callable[[Settings], tuple[float, float]]"
EffectiveRates: TypeAlias = "Callable[[Tensor, Mapping[str, Tensor], Tensor], Tensor]"


@dataclass(frozen=True)
class OptimizerRule:
    r"""The formulas of one optimizer. A formula that is None does not exist, and what needs it is
    refused by name.

    Weight decay is not part of the formulas: it is the column ``weight_decay``, added to the
    gradient (coupled) or taken off the parameter at the applied rate (decoupled).

    Attributes:
        optimizer: the class; its own ``step`` is what a replay runs.
        settings: columns of the steps table, torch.optim's keys of a parameter group. Of a group's
            tuple, ``betas`` for example, the members are ``beta1`` and ``beta2``.
        states: names of the state tensors that have the parameter's shape.
        adjoint: one step backwards, ``(a, states, step) -> u``. ``a`` [query, *shape] is the
            derivative of the measurement with respect to the parameter after the step, and
            ``states`` are the derivatives with respect to the states, by name, zero at first. They
            are turned in place into those before the step; the result is
            :math:`u = \partial m / \partial g` [query, *shape], which shares no memory with them.
            With an ``elementwise`` rule, rate, settings and count may be tensors. Needed by
            ``Unrolled``.
        reads: the states that ``adjoint`` reads.
        reads_gradient: whether ``adjoint`` reads the gradient.
        advance: one step of the states, ``(states, gradient, settings) -> states``. With
            ``adjoint``, needed by ``Source(order="recorded")``.
        metric: the matrix P of a step ``theta -= rate * P g`` at fixed states, as its diagonal
            (``(states, settings, count) -> P``), 0 for elements that have never moved. Needed by
            ``Source``; a ``linear`` rule has P = 1.
        squares: the state that sums up squared gradients, if one does, ``v <- keep v + add g^2``,
            with (keep, add) by settings.
        edge: ``(settings, steps) -> x``: the largest rate times curvature in P's coordinates at
            which so many steps cannot blow up. None: 1, half of gradient descent's.
        effective_rates: the rate at which a constant gradient moves the parameters in the end,
            ``(rates [steps, groups], settings by column, steps taken before [steps])``. None: the
            rates themselves.
        linear: a step is linear in the gradients so far, which at most one state sums up.
        elementwise: every element of a parameter is stepped by itself.
        decoupled: weight decay is.
        remembers: whether the steps to come depend on states, given all settings of the run. None:
            when there are any states.
        cancelling_steps: the first so many steps divide a gradient by its own length, which cancels
            in the derivative: it is taken in float64.
        choices: of a setting that is no number, its values in a fixed order; the position is
            recorded.
        unsupported: options that change the formulas. A run that sets one has no rule.
        name: under which runs are recorded. None: the name of a class of ``torch.optim``, the full
            path of another.
    """

    optimizer: type[Optimizer]
    settings: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    adjoint: Adjoint | None = None
    reads: tuple[str, ...] = ()
    reads_gradient: bool = False
    advance: Advance | None = None
    metric: Metric | None = None
    squares: tuple[str, Squares] | None = None
    edge: Callable[[Settings, int], float] | None = None
    effective_rates: EffectiveRates | None = None
    linear: bool = False
    elementwise: bool = True
    decoupled: bool = False
    remembers: Callable[[Mapping[str, Tensor]], bool] | None = None
    cancelling_steps: int = 0
    choices: Mapping[str, Sequence[object]] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ("maximize", "differentiable")
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", class_name(self.optimizer))
        unknown = {*self.reads} - {*self.states}
        if unknown:
            raise ValueError(
                f"The rule of {self.name} reads {sorted(unknown)}, which are not among its states "
                f"{list(self.states)}."
            )
        if self.linear and len(self.states) > 1:
            raise ValueError(
                f"A linear rule has at most one state, got {list(self.states)} of {self.name}. "
                "Set linear=False and give a metric."
            )

    def read(self, group: Mapping[str, Any]) -> dict[str, float]:
        """Settings of a parameter group as numbers, by column."""
        numbers = {}
        for column in self.settings:
            key, position = _place(group, column)
            value = group[key] if position is None else group[key][position]
            if column in self.choices:
                value = list(self.choices[column]).index(value)
            numbers[column] = float(value)
        return numbers

    def write(self, group: dict[str, Any], settings: Settings) -> None:
        """Set a parameter group, which holds its defaults, to what :meth:`read` gave."""
        for column in self.settings:
            value: Any = settings[column]
            key, position = _place(group, column)
            if position is not None:
                value = (*group[key][:position], value, *group[key][position + 1 :])
            elif column in self.choices:
                value = self.choices[column][int(value)]
            elif isinstance(group[key], bool):
                value = bool(value)
            elif isinstance(group[key], int) and value == int(value):
                value = int(value)  # a count stays one; a default of 0 may stand for 0.0
            group[key] = value

    def options(self, group: Mapping[str, object]) -> list[str]:
        """The unsupported options that a parameter group sets."""
        return [option for option in self.unsupported if group.get(option)]


def class_name(optimizer: type[Optimizer]) -> str:
    """The plain name of a class of ``torch.optim``, the full path of another: never alike."""
    if optimizer is getattr(torch.optim, optimizer.__name__, None):
        return str(optimizer.__name__)
    return f"{optimizer.__module__}.{optimizer.__qualname__}"


def _place(group: Mapping[str, object], column: str) -> tuple[str, int | None]:
    """Key and position of a column: ``("betas", 1)`` of ``beta2``."""
    if column in group:
        return column, None
    stem = column.rstrip("0123456789")
    return f"{stem}s", int(column.removeprefix(stem)) - 1
