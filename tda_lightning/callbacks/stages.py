"""Where the set of trained parameters changes, a stage begins."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from tda_lightning.callbacks.facts import Trained, parameter_facts
from tda_lightning.compiled import plain_parameters
from tda_lightning.errors import UnsupportedTrainingError
from tda_lightning.trajectory import Facts, StageFact


def held_parameters(optimizer: Optimizer) -> dict[int, int]:
    """Group of every parameter that the optimizer holds and trains, by the parameter's id."""
    return {
        id(parameter): number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if parameter.requires_grad
    }


def ids(trained: Trained) -> dict[int, int]:
    """The same of what was found by name."""
    return {id(parameter): group for parameter, group in trained.values()}


def united(recorded: Trained, trained: Trained, module: nn.Module) -> Trained:
    """Everything trained in any stage so far, in the module's order.

    Raises:
        UnsupportedTrainingError: a parameter has moved to another group of the optimizer.
    """
    moved = [n for n, (_, g) in trained.items() if n in recorded and recorded[n][1] != g]
    if moved:
        name = moved[0]
        raise UnsupportedTrainingError(
            f"Parameter {name} moved from group {recorded[name][1]} of the optimizer to group "
            f"{trained[name][1]} ({len(moved)} parameters in all moved); expected each to stay "
            "where it was. Change a group's settings instead, or add groups behind the others."
        )
    both = {**recorded, **trained}
    return {name: both[name] for name in plain_parameters(module) if name in both}


def begin_stage(facts: Facts, start: int, everything: Trained, trained: Trained) -> Facts:
    """The facts of a run whose rows from ``start`` on train ``trained``.

    A stage that got no row, or lies beyond ``start``, has never happened.
    """
    earlier = [stage for stage in facts.stages if stage.start < start]
    new = StageFact(start, tuple(trained))
    if earlier and earlier[-1].parameters == new.parameters:
        stages = tuple(earlier)  # frozen and unfrozen again without a step in between
    else:
        stages = (*earlier, new)
    used = {name for stage in stages for name in stage.parameters}
    kept = {name: found for name, found in everything.items() if name in used}
    return replace(facts, parameters=parameter_facts(kept), stages=stages)
