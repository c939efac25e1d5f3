"""Shows a module the moment of its recorded run that is asked about: epoch, step, rates."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Hashable
from typing import cast

from torch import nn
from torch.optim import Optimizer

from tda_lightning.optimizers import apply_settings, make_optimizer
from tda_lightning.records.trajectory import StageCheckpoints, Trajectory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.module_state import restored
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.runtime.set_by_hooks import carried, set_by_hooks
from tda_lightning.runtime.silence import silenced
from tda_lightning.runtime.stand_in import Moment, TrainerStandIn, stand_in_of
from tda_lightning.runtime.structures import same

# What they set can be made of what they see.
_STARTS = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")


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
        _call_hooks(module, stand_in)


def _call_hooks(module: nn.Module, trainer: TrainerStandIn) -> None:
    """Let the hooks at the start of an epoch and a batch set what ``training_step`` reads, where
    they make it of what they see, and note what remains unknown."""
    moment = trainer.moment
    assert moment is not None
    held = {*module._buffers, *module._parameters, *module._modules}  # checkpoints hold them
    if "training_step" not in trainer.shown:
        trainer.shown["training_step"] = None
        _note_carried(trainer, carried(module))
    for hook, set_there in set_by_hooks(cast(Hashable, type(module))).items():
        each_batch = hook == "on_train_batch_start"
        now = (moment.epoch, moment.step, moment.batch) if each_batch else moment.epoch
        names = set_there - held
        if not names or trainer.shown.get(hook) == now:
            continue
        trainer.shown[hook] = now
        arguments = (None, moment.batch) if each_batch else ()
        if hook not in _STARTS or not _called(module, trainer, hook, names, arguments):
            _note_unknown(trainer, hook, names)


def _called(
    module: nn.Module,
    trainer: TrainerStandIn,
    hook: str,
    names: Collection[str],
    arguments: tuple[object, ...],
) -> bool:
    """Call a hook, unless it does otherwise the second time: then it counts, or draws."""
    held = dict(vars(module))
    values = []
    with restored(module, "modes", "requires_grad", "parameters", "buffers"), silenced(module):
        for _ in range(2):
            try:
                with unchanged_randomness():
                    getattr(module, hook)(*arguments)
            except Exception:  # it needs what only training has
                break
            values.append({name: copy.copy(getattr(module, name, None)) for name in names})
    known = len(values) == 2 and same(*values)
    for name in [*vars(module)]:
        if known and name in names:
            trainer.kept.setdefault(name, (name in held, held.get(name)))
        elif name not in held:
            del vars(module)[name]
    vars(module).update({name: old for name, old in held.items() if not known or name not in names})
    return known


def _note_carried(trainer: TrainerStandIn, names: Collection[str]) -> None:
    if names:
        _note(
            trainer,
            f"training_step carries {_named(names)} on from batch to batch (a counter, a running "
            "mean), and attribution calls it for other batches: what it reads there is not what "
            "it read in training. Make it of current_epoch or global_step, or keep it in a buffer "
            "that changes only where self.training is set.",
        )


def _note_unknown(trainer: TrainerStandIn, hook: str, names: Collection[str]) -> None:
    _note(
        trainer,
        f"training_step reads {_named(names)}, which {hook} sets in training. Here it is as the "
        "module has it, which may be another value than at the checkpoint. Compute it in "
        "training_step, from current_epoch or global_step.",
    )


def _named(names: Collection[str]) -> str:
    return ", ".join(f"self.{name}" for name in sorted(names))


def _note(trainer: TrainerStandIn, text: str) -> None:
    if text not in trainer.unknown:
        trainer.unknown.append(text)
        warnings.warn(text, stacklevel=5)


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
    processes = settings.get("world_size") or 1  # whose batches stand side by side
    batches = settings.get("num_training_batches")
    if batches is None and bool((epoch > epoch[0]).any()):
        batches = int(offsets[int((epoch > epoch[0]).nonzero()[0])]) // processes
    number = (inside[batch] if len(inside) else int(offsets[row])) - int(offsets[first])
    return Moment(
        int(epoch[row]),
        before + row,
        number // processes,
        batches,
        steps.learning_rate[row].tolist(),
        settings,
        optimizer,
    )
