"""Which rule belongs to an optimizer, and to a recorded run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.optimizers import adagrad, adam, muon, rmsprop, sgd
from tda_lightning.optimizers.rule import OptimizerRule, class_name
from tda_lightning.records.errors import TrajectoryFormatError, UnsupportedTrainingError
from tda_lightning.records.trajectory import Trajectory

_RULES: dict[str, OptimizerRule] = {}
_BY_CLASS: dict[type[Optimizer], OptimizerRule | None] = {}  # found so far, subclasses as well

# Optimizers whose recorded rates say nothing of how far the parameters went, and why.
_RATELESS = {
    "LBFGS": "each step of it evaluates the loss several times, along directions of its own"
}


def register(rule: OptimizerRule) -> OptimizerRule:
    """Make ``rule`` known, in place of an earlier one of its name.

    A run is looked up by the recorded name of its optimizer, so the rule must be registered both
    where it is recorded and where it is attributed.

    Example:
        >>> class Descent(Optimizer):
        ...     "theta <- theta - rate * g, by a step of its own."
        ...     def step(self, closure=None): ...
        >>> rule = OptimizerRule(
        ...     optimizer=Descent, adjoint=lambda a, states, step: -step.rate * a, linear=True
        ... )
        >>> find_rule(register(rule).name) is rule
        True
    """
    _RULES[rule.name] = rule
    _BY_CLASS.clear()
    return rule


def find_rule(name: str) -> OptimizerRule | None:
    """The rule of that name, if there is one."""
    return _RULES.get(name)


def known_optimizers() -> list[str]:
    """Names of the optimizers that have a rule."""
    return list(_RULES)


def optimizer_name(optimizer: Optimizer) -> str:
    """The name that a run by ``optimizer`` is recorded under, which selects the rule.

    A subclass has its parent's rule and name unless it steps in its own way. With an option that
    changes the formulas, such as ``Adam(amsgrad=True)``, the name says so and has no rule.
    """
    rule = _rule_of_class(type(optimizer))
    if rule is None:
        return class_name(type(optimizer))
    decoupled = [bool(group.get("decoupled_weight_decay")) for group in optimizer.param_groups]
    if all(decoupled) and rule.name == "Adam":
        rule = _RULES["AdamW"]  # the same update under its other name
    options = dict.fromkeys(o for group in optimizer.param_groups for o in rule.options(group))
    if any(decoupled) and not rule.decoupled:
        options["decoupled_weight_decay"] = None  # in some groups only
    written = ", ".join(f"{option}=True" for option in options)
    return f"{rule.name}({written})" if written else rule.name


def _rule_of_class(optimizer: type[Optimizer]) -> OptimizerRule | None:
    if optimizer not in _BY_CLASS:
        _BY_CLASS[optimizer] = _inherited_rule(optimizer)
    return _BY_CLASS[optimizer]


def _inherited_rule(optimizer: type[Optimizer]) -> OptimizerRule | None:
    rules = {rule.optimizer: rule for rule in _RULES.values()}
    for parent in optimizer.__mro__:
        if parent in rules:
            same = all(_own(optimizer, m) is _own(parent, m) for m in ("step", "_init_group"))
            return rules[parent] if same else None
    return None


def _own(optimizer: type[Optimizer], method: str) -> Callable[..., object] | None:
    """A method as it was written: torch.optim puts a hook around ``step`` in each class that is
    instantiated, a subclass that inherits it included."""
    function = getattr(optimizer, method, None)
    while function is not None and "hooked" in vars(function) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def read_rates(optimizer: Optimizer) -> list[float]:
    """Learning rate of each parameter group.

    Raises:
        UnsupportedTrainingError: a group has none.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    known = [float(rate) for rate in rates if rate is not None]
    if len(known) < len(rates):
        raise UnsupportedTrainingError(
            f"{class_name(type(optimizer))} has no learning rate in its parameter groups (lr is "
            "missing or None), and every estimator needs the applied rates. Use an optimizer that "
            "keeps its rate in param_groups under 'lr'."
        )
    return known


def read_hyperparameters(optimizer: Optimizer) -> dict[str, list[float]]:
    """Settings by column of the steps table, one value for each parameter group: those of the
    rule; without a rule, every number that all groups have."""
    rule = _rule_of_class(type(optimizer))
    groups = [rule.read(g) if rule else _numbers(g) for g in optimizer.param_groups]
    columns = rule.settings if rule else sorted(set.intersection(*(set(g) for g in groups)))
    return {column: [group[column] for group in groups] for column in columns}


def _numbers(group: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in group.items():
        if name == "betas":
            for position, beta in enumerate(value, start=1):
                numbers[f"beta{position}"] = float(beta)
        elif name not in ("lr", "initial_lr") and isinstance(value, Real | Tensor):
            numbers[name] = float(value)
    return numbers


def rule_of(trajectory: Trajectory) -> OptimizerRule:
    """The rule of a recorded run.

    Raises:
        UnsupportedTrainingError: there is none.
        TrajectoryFormatError: the steps lack a setting of it.
    """
    rule = rule_if_known(trajectory)
    if rule is None:
        raise UnsupportedTrainingError(
            f"The run was trained with {trajectory.facts.optimizer}, for which there is no "
            f"formula. Supported optimizers: {', '.join(known_optimizers())}. TracIn and "
            "InfluenceFunction need none; tda_lightning.optimizers.register adds one."
        )
    return rule


def rule_if_known(trajectory: Trajectory) -> OptimizerRule | None:
    """:func:`rule_of`, None where there is none."""
    rule = find_rule(trajectory.facts.optimizer)
    recorded = trajectory.steps.hyperparameters
    if rule is not None and len(trajectory.steps) and not {*rule.settings} <= set(recorded):
        raise TrajectoryFormatError(
            f"The steps table does not belong to the facts beside it: expected the "
            f"hyper-parameters of {rule.name}, {list(rule.settings)}, got {sorted(recorded)}. "
            "Restore the files from a copy, or record again."
        )
    return rule


def require_formula(trajectory: Trajectory, formula: str, needed_by: str) -> OptimizerRule:
    """The rule of a recorded run, which has the ``formula``: ``adjoint``, ``metric`` or
    ``advance``.

    Raises:
        UnsupportedTrainingError: there is no rule, or it lacks the formula.
    """
    rule = rule_of(trajectory)
    if getattr(rule, formula) is None and not (formula == "metric" and rule.linear):
        raise UnsupportedTrainingError(
            f"The run was trained with {rule.name}, whose rule has no {formula}, and {needed_by} "
            f"needs one. {_WITHOUT[formula]}"
        )
    return rule


_WITHOUT = {
    "metric": "Use Unrolled, which differentiates each step, or TracIn or InfluenceFunction.",
    "adjoint": "Use TracIn or InfluenceFunction.",
    "advance": "Use order='average'.",
}


def consequences(name: str) -> str | None:
    """What can be asked of a run by the optimizer of that name; None where it has a rule."""
    if name in _RULES:
        return None
    text = f"There is no formula for {name}, so Source and Unrolled will refuse the run, and it "
    text += "cannot be replayed. "
    if reason := _without_rates(name):
        return f"{text}TracIn will refuse it too: {reason}. InfluenceFunction works."
    return (
        f"{text}TracIn and InfluenceFunction, which need the applied rates alone, work. To add the "
        "formulas, see tda_lightning.optimizers.register."
    )


def require_rates(trajectory: Trajectory) -> None:
    """Check that the recorded rates say how far a gradient moved the parameters.

    Raises:
        UnsupportedTrainingError: they do not, and why.
    """
    name = trajectory.facts.optimizer
    if reason := _without_rates(name):
        raise UnsupportedTrainingError(
            f"The run was trained with {name}, whose rates do not say how far a gradient moved the "
            f"parameters: {reason}. Use InfluenceFunction, which looks at the final weights alone."
        )


def _without_rates(name: str) -> str | None:
    if "maximize=True" in name:
        return "it follows the gradient uphill"
    return _RATELESS.get(name)


for _module in (sgd, adam, rmsprop, adagrad, muon):
    for _rule in _module.RULES:
        register(_rule)
