"""Where the set of trained parameters changes, or another optimizer begins, a stage begins."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from tda_lightning.recording.facts import Trained, parameter_facts
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Facts, StageFact
from tda_lightning.runtime.compiled import plain_parameters


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


def begin_stage(
    facts: Facts, start: int, module: nn.Module, recorded: Trained, trained: Trained
) -> tuple[Facts, Trained]:
    """The facts of a run whose rows from ``start`` on train ``trained``, and everything that is
    trained in any of its stages, in the module's order.

    A stage that got no row, or lies beyond ``start``, has never happened.

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
    stages = [stage for stage in facts.stages if stage.start < start]
    new_fit = any(stage.new_optimizer for stage in facts.stages if stage.start == start)
    # Frozen and unfrozen again without a step in between, the stage before just goes on.
    if not stages or new_fit or stages[-1].parameters != tuple(trained):
        stages.append(StageFact(start, tuple(trained), new_fit))
    used = {name for stage in stages for name in stage.parameters}
    both = {**recorded, **trained}
    kept = {name: both[name] for name in plain_parameters(module) if name in used}
    return replace(facts, parameters=parameter_facts(kept), stages=tuple(stages)), kept


def stage_under_way(
    facts: Facts, module: nn.Module, trained: Trained
) -> tuple[Trained, dict[int, int]]:
    """Everything that a recorded run has trained in any of its stages, found in ``module``, and by
    id what its last stage trains. What the module lacks is left out: the comparison with the facts
    will say so."""
    found = plain_parameters(module)
    both = {
        name: trained.get(name, (found[name], fact.group))
        for name, fact in facts.parameters.items()
        if name in found
    }
    last = facts.stages[-1].parameters
    return both, ids({name: both[name] for name in last if name in both})
