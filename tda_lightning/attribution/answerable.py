"""What can be asked of a run of which only checkpoints were kept, or that is seen under a mask."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from tda_lightning.attribution.member_modules import DROPOUT
from tda_lightning.estimators import FastInfluence, InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.estimators.base import Estimator
from tda_lightning.optimizers import find_rule
from tda_lightning.records.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tda_lightning.records.trajectory import FROM_CHECKPOINTS, Checkpoint, Trajectory
from tda_lightning.runtime.compiled import plain_buffers, plain_name, plain_parameters


def require_answerable(trajectory: Trajectory, estimator: Estimator) -> None:
    """Refuse estimators that need more of a run than its checkpoints, where there is no more.

    Raises:
        UnsupportedTrainingError: names the estimator and what it lacks.
    """
    if DROPOUT in trajectory.facts.settings and isinstance(estimator, Unrolled):
        raise UnsupportedTrainingError(
            "This member of an ensemble is the recorded run under a dropout mask, which it was "
            "not trained under, so there is no run to differentiate. Use Source, InfluenceFunction "
            "or TracIn, or an ensemble of seeds or forks."
        )
    if not trajectory.facts.settings.get(FROM_CHECKPOINTS):
        return
    name, missing = type(estimator).__name__, None
    needs_rates = isinstance(estimator, TracIn | Source) or (
        isinstance(estimator, InfluenceFunction | FastInfluence)
        and getattr(estimator, "damping", None) == "segment"
    )
    if isinstance(estimator, Unrolled):
        missing = "replays the run, and which batches it had and what it drew was not recorded"
    elif isinstance(estimator, Source) and estimator.order != "average":
        name = f"Source(order={estimator.order!r})"
        missing = "follows the batches in their order, which was not recorded"
    elif needs_rates and bool(trajectory.steps.learning_rate.isnan().any()):
        missing = (
            "needs the learning rates: Trajectory.from_checkpoints(..., learning_rates=...), one, "
            "or one for the steps up to each checkpoint"
        )
    elif isinstance(estimator, Source) and find_rule(trajectory.facts.optimizer) is None:
        missing = (
            "needs the optimizer: Trajectory.from_checkpoints(..., optimizer=...), made as in "
            "training"
        )
    if missing is not None:
        raise UnsupportedTrainingError(
            f"The run was put together from checkpoints, and {name} {missing}. Of checkpoints "
            "alone InfluenceFunction, FastInfluence and TRAK can be asked, and with learning rates "
            "TracIn and Source(order='average'); for the rest record the run with "
            "TrajectoryRecorder."
        )


def with_own_parameters(trajectory: Trajectory, module: nn.Module) -> Trajectory:
    """A run put together from state dicts, which do not say what is a parameter and what a buffer:
    its parameters are those that the module trains.

    Raises:
        TrajectoryMismatchError: the checkpoints are of another module.
    """
    facts = trajectory.facts
    if not facts.settings.get(FROM_CHECKPOINTS):
        return trajectory
    own, given = plain_parameters(module), facts.parameters
    known = {*own, *plain_buffers(module)}
    # A state dict has tied weights under each of their names.
    again = {plain_name(n) for n, _ in module.named_parameters(remove_duplicate=False)} - known
    strange = [name for name in given if name not in known | again]
    missing = [name for name in own if name not in given]
    if strange or missing:
        parts = [f"not in the module: {', '.join(strange[:5])}"] if strange else []
        parts += [f"not in the checkpoints: {', '.join(missing[:5])}"] if missing else []
        raise TrajectoryMismatchError(
            f"The checkpoints are not of this module: {'; '.join(parts)}. Build the module as it "
            "was trained, or give the state dict of this module."
        )
    held = {name: given[name] for name in own if own[name].requires_grad}
    checkpoints = {
        step: Checkpoint(
            step,
            {name: saved.parameters[name] for name in held},
            {n: v for n, v in saved.parameters.items() if n not in held and n not in again},
        )
        for step, saved in trajectory.checkpoints.items()
    }
    return replace(
        trajectory, facts=replace(facts, parameters=held, stages=()), checkpoints=checkpoints
    )
