"""What the rules say of a recorded run: its rates, its metric, its optimizer built again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.optimizers.registry import require_formula, rule_if_known, rule_of
from tda_lightning.optimizers.rule import STEP_COUNT, WEIGHT_DECAY, ParameterStep
from tda_lightning.records.errors import TrajectoryFormatError, UnsupportedTrainingError
from tda_lightning.records.trajectory import Trajectory


def applied_rates(trajectory: Trajectory, rows: slice) -> Tensor:
    """Rates at which gradients reach the parameters, float64 [steps, groups].

    Momentum multiplies the rate, and clipping divides the step of a linear rule by as much as the
    gradient; the others normalise a gradient's length away, and their metric is counted apart.
    Without a rule, the recorded rates.
    """
    rule, steps = rule_if_known(trajectory), trajectory.steps
    rates = steps.learning_rate[rows]
    if rule is None:
        return rates
    if rule.effective_rates is not None:
        settings = {name: values[rows] for name, values in steps.hyperparameters.items()}
        earlier = max(trajectory.steps_before.values(), default=0)
        before = torch.arange(len(steps), dtype=torch.float64)[rows] + earlier
        rates = rule.effective_rates(rates, settings, before)
    return rates * trajectory.clipping_factors(rows) if rule.linear else rates


def weight_decay(trajectory: Trajectory, rows: slice) -> Tensor:
    """Recorded weight decay, float64 [steps, groups]; 0 for an optimizer that has none."""
    steps = trajectory.steps
    found = steps.hyperparameters.get(WEIGHT_DECAY)
    return torch.zeros_like(steps.learning_rate[rows]) if found is None else found[rows]


def row_settings(trajectory: Trajectory, row: int, group: int) -> dict[str, float]:
    """The settings of a parameter group in one step, by column."""
    table = trajectory.steps.hyperparameters
    return {name: float(values[row, group]) for name, values in table.items()}


def recorded_states(trajectory: Trajectory, step: int) -> Mapping[str, Mapping[str, Tensor]]:
    """The optimizer's states at a checkpoint, by parameter.

    Raises:
        UnsupportedTrainingError: they were not recorded.
        TrajectoryFormatError: one of them does not fit its parameter.
    """
    rule, states = rule_of(trajectory), trajectory.checkpoints[step].optimizer
    if states is None:
        raise UnsupportedTrainingError(
            f"The checkpoint at step {step} has no optimizer state, and the states of {rule.name} "
            f"({', '.join(rule.states)}) are part of the formula. Record with save_optimizer=True."
        )
    for name, fact in trajectory.facts.parameters.items():
        for key, value in states.get(name, {}).items():
            if key in rule.states and tuple(value.shape) != tuple(fact.shape):
                raise TrajectoryFormatError(
                    f"The checkpoint at step {step} is damaged: {key} of {name} has shape "
                    f"{list(value.shape)}, expected {list(fact.shape)}. Restore it from a copy, or "
                    "record again."
                )
    return states


def checkpoint_metric(trajectory: Trajectory, step: int) -> dict[str, Tensor]:
    """The rule's metric P at a checkpoint, float64 by parameter; empty where P = 1. An element that
    has never had a gradient has not moved, and has P = 0.

    Raises:
        UnsupportedTrainingError: the optimizer has no metric, or its states were not recorded.
    """
    rule = require_formula(trajectory, "metric", "SOURCE")
    if rule.metric is None:
        return {}
    states, metric = recorded_states(trajectory, step), {}
    for name, fact in trajectory.facts.parameters.items():
        own = {key: value.double() for key, value in states.get(name, {}).items()}
        metric[name] = torch.zeros(fact.shape, dtype=torch.float64)
        if own:  # else it has never had a gradient
            settings = row_settings(trajectory, step - 1, fact.group)
            metric[name] = rule.metric(own, settings, count_of(own))
    return metric


def count_of(states: Mapping[str, Tensor]) -> float:
    """How often the optimizer has stepped a parameter, if it counts."""
    return float(states[STEP_COUNT]) if STEP_COUNT in states else 0.0


def remembers(trajectory: Trajectory) -> bool:
    """Whether the run's steps depended on the optimizer's states."""
    rule = rule_of(trajectory)
    if rule.remembers is None:
        return bool(rule.states)
    return rule.remembers(trajectory.steps.hyperparameters)


def first_step_differs(trajectory: Trajectory) -> bool:
    """Whether the first row steps a parameter without states otherwise than one that has them."""
    rule = rule_of(trajectory)
    assert rule.adjoint is not None
    for group in range(trajectory.steps.learning_rate.shape[1]):
        settings, probe = row_settings(trajectory, 0, group), torch.ones(1, dtype=torch.float64)
        first, later = (
            rule.adjoint(
                probe,
                {name: torch.zeros_like(probe) for name in rule.states},
                ParameterStep(1.0, settings, probe, {}, 1, frozenset(new)),
            )
            for new in (rule.states, ())
        )
        if not torch.equal(first, later):
            return True
    return False


def make_optimizer(trajectory: Trajectory, trained: Mapping[str, Tensor]) -> Optimizer:
    """The recorded optimizer over ``trained``, its groups and first settings as recorded."""
    rule, facts = rule_of(trajectory), trajectory.facts
    groups: list[dict[str, object]] = [
        {"params": [trained[n] for n, fact in facts.parameters.items() if fact.group == number]}
        for number in range(trajectory.steps.learning_rate.shape[1])
    ]
    build: Callable[..., Optimizer] = rule.optimizer
    optimizer: Optimizer = build(groups, lr=0.0)
    if len(trajectory.steps):
        apply_settings(trajectory, optimizer, 0)
        if optimizer.state:  # it begins with states, which may depend on its settings
            first = optimizer.param_groups[0]
            given = {key: value for key, value in first.items() if key in rule.settings}
            optimizer = build(groups, **{**given, "lr": 0.0})
    return optimizer


def apply_settings(trajectory: Trajectory, optimizer: Optimizer, row: int) -> None:
    """Give every group the rate and settings that step row + 1 used."""
    rule = rule_of(trajectory)
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = float(trajectory.steps.learning_rate[row, number])
        rule.write(group, row_settings(trajectory, row, number))
