"""One file for each family of optimizers: its settings, its states, its step, its adjoint.

No code outside this folder names an optimizer. To attribute runs of another one, give its formulas
as an :class:`OptimizerRule` and :func:`register` it.
"""

from tda_lightning.optimizers.registry import (
    consequences,
    find_rule,
    known_optimizers,
    optimizer_name,
    read_hyperparameters,
    read_rates,
    register,
    require_formula,
    require_rates,
    rule_if_known,
    rule_of,
)
from tda_lightning.optimizers.rule import STEP_COUNT, WEIGHT_DECAY, OptimizerRule, ParameterStep
from tda_lightning.optimizers.runs import (
    applied_rates,
    apply_settings,
    checkpoint_metric,
    count_of,
    first_step_differs,
    make_optimizer,
    recorded_states,
    remembers,
    row_settings,
    weight_decay,
)

__all__ = [
    "STEP_COUNT",
    "WEIGHT_DECAY",
    "OptimizerRule",
    "ParameterStep",
    "applied_rates",
    "apply_settings",
    "checkpoint_metric",
    "consequences",
    "count_of",
    "find_rule",
    "first_step_differs",
    "known_optimizers",
    "make_optimizer",
    "optimizer_name",
    "read_hyperparameters",
    "read_rates",
    "recorded_states",
    "register",
    "remembers",
    "require_formula",
    "require_rates",
    "row_settings",
    "rule_if_known",
    "rule_of",
    "weight_decay",
]
