"""Shows a module the moment of its recorded run that is asked about: epoch, step, rates."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from tda_lightning.optimizers import apply_settings, make_optimizer
from tda_lightning.records.trajectory import StageCheckpoints, Trajectory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.stand_in import Moment, stand_in_of


def show(
    module: nn.Module,
    trajectory: Trajectory,
    row: int,
    batch: int = -1,
    source: ExampleSource | None = None,
) -> None:
    """Let the module's steps see what they saw in step ``row + 1`` of the run.

    At the checkpoint of a step that is the step that led to it: epoch 5 at the end of 6 epochs. A
    module that is none of Lightning's, or in training, is left alone.

    Args:
        batch: which of those that the step accumulated.
        source: the training set.
    """
    stand_in = stand_in_of(module)
    if stand_in is not None:
        stand_in.moment = moment_of(module, trajectory, max(row, 0), batch)
        stand_in.source = stand_in.source if source is None else source


def moment_of(module: nn.Module, trajectory: Trajectory, row: int, batch: int = -1) -> Moment:
    """The moment of a batch of step ``row + 1``."""
    steps, held = trajectory.steps, trajectory.checkpoints
    # A stage of a run counts its steps from 0; the trainer went on counting.
    before = held.start if isinstance(held, StageCheckpoints) else 0
    settings = dict(trajectory.facts.settings)
    for change in settings.get("changes") or ():  # a further fit, with another number of epochs
        if change["step"] <= before + row:
            settings[change["name"]] = change["after"]

    def optimizer() -> Optimizer:
        names = trajectory.facts.parameters
        made = make_optimizer(trajectory, {name: module.get_parameter(name) for name in names})
        if row < len(steps):
            apply_settings(trajectory, made, row)
        return made

    if row >= len(steps):
        return Moment(0, before, 0, settings.get("num_training_batches"), [], settings, optimizer)
    epoch, offsets = steps.epoch, steps.batch_offsets
    first = int((epoch == epoch[row]).nonzero()[0])
    inside = range(int(offsets[row]), int(offsets[row + 1]))
    batches = settings.get("num_training_batches")
    if batches is None and bool((epoch > epoch[0]).any()):
        batches = int(offsets[int((epoch > epoch[0]).nonzero()[0])])
    number = (inside[batch] if len(inside) else int(offsets[row])) - int(offsets[first])
    return Moment(
        int(epoch[row]),
        before + row,
        number,
        batches,
        steps.learning_rate[row].tolist(),
        settings,
        optimizer,
    )
