"""Several stages of training: which module, task and data each has, and what passes between them.

Parameters of two stages are the same where name and shape agree: a new head of other width is
another parameter even under the old name. What is the same must have the same values at the end of
one stage and the start of the next, else the stages are not one training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.attribution.answerable import with_own_parameters
from tda_lightning.attribution.matching import (
    attributed_parameters,
    require_same_base,
    require_same_parameters,
)
from tda_lightning.attribution.member_modules import member_module
from tda_lightning.gradients import GradientEngine
from tda_lightning.optimizers import rule_if_known
from tda_lightning.records.errors import EngineError, TrajectoryMismatchError
from tda_lightning.records.trajectory import Checkpoint, Trajectory
from tda_lightning.runtime.compiled import plain_parameters, uncompiled
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.loading import ExampleSource, is_data_module
from tda_lightning.session.session import Session
from tda_lightning.tasks import AttributionTask, as_task


@dataclass(frozen=True)
class StageSetup:
    """What one stage was trained with.

    Attributes:
        trained: parameters that the stage trained and its task takes into account.
        frozen: those that an earlier stage trained and this one only uses.
        carried: those of both whose values come from the stage before.
        run: position of the recorded run that the stage is (part) of.
        first_step: steps of all stages before it.
    """

    module: nn.Module
    task: AttributionTask
    trajectory: Trajectory
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    carried: tuple[str, ...]
    run: int
    first_step: int


def set_up(
    module: nn.Module | Sequence[nn.Module],
    trajectory: str | Trajectory | Sequence[str | Trajectory],
    task: AttributionTask | Sequence[AttributionTask | None] | None,
    fresh: Sequence[str] = (),
    staged: bool = True,
) -> list[StageSetup]:
    """The stages in order of training.

    A single module or task serves all trajectories. With ``staged`` False a single trajectory is
    one stage, whatever was trained when.

    Raises:
        ValueError: lists of different lengths.
        TrajectoryMismatchError: a module is not the recorded one, or a stage does not begin with
            the weights that the one before ended with.
    """
    # A path may be any object with a text: only a list is several.
    runs: list[object] = [*trajectory] if isinstance(trajectory, list | tuple) else [trajectory]
    if not runs:
        raise ValueError("trajectory is an empty list: give at least one recorded run.")
    modules: list[Any] = [*module] if isinstance(module, list | tuple) else [module] * len(runs)
    modules = [uncompiled(one) for one in modules]
    tasks: list[Any] = [*task] if isinstance(task, list | tuple) else [task] * len(runs)
    for name, given in (("module", modules), ("task", tasks)):
        if len(given) != len(runs):
            raise ValueError(
                f"{name} must be one, or a list of one for each of the {len(runs)} trajectories, "
                f"got {len(given)}."
            )
    loaded = [one if isinstance(one, Trajectory) else Trajectory.load(str(one)) for one in runs]
    loaded = [with_own_parameters(run, own) for own, run in zip(modules, loaded, strict=True)]
    modules = [member_module(own, run) for own, run in zip(modules, loaded, strict=True)]
    found: list[StageSetup] = []
    used: set[int] = set()
    for run, (one, own, asked) in enumerate(zip(loaded, modules, tasks, strict=True)):
        for stage in one.stages() if staged else (one,):
            require_same_parameters(own, stage)
            rule_if_known(stage)
            chosen = as_task(asked)
            if id(chosen) in used:
                # A task remembers what it saw of its stage's batches.
                chosen = copy.deepcopy(chosen)
            used.add(id(chosen))
            found.append(_stage(found, own, chosen, stage, run, fresh))
    return found


def _stage(
    before: Sequence[StageSetup],
    module: nn.Module,
    task: AttributionTask,
    trajectory: Trajectory,
    run: int,
    fresh: Sequence[str],
) -> StageSetup:
    trained = attributed_parameters(trajectory, task)
    if not before:
        require_same_base(module, trajectory)
        return StageSetup(module, task, trajectory, tuple(trained), (), (), run, 0)
    last = before[-1]
    theirs, own = plain_parameters(last.module), plain_parameters(module)
    shared = [
        name
        for name in (*last.trained, *last.frozen)
        if name in own
        and own[name].shape == theirs[name].shape
        and not any(name == part or name.startswith(f"{part}.") for part in fresh)
    ]
    if not shared:
        raise TrajectoryMismatchError(
            f"Stage {len(before) + 1} shares no parameter of the same name and shape with what "
            f"stage {len(before)} trained ({', '.join((*last.trained, *last.frozen)[:5])}, ...): "
            "nothing could pass from one to the other. Give the trajectories in the order of "
            "training, and modules that name shared parameters alike."
        )
    trajectory = _with_base_of(last.trajectory, trajectory, module, shared)
    require_continuous(last.trajectory, trajectory, shared, len(before))
    require_same_base(module, trajectory)
    frozen = [name for name in shared if name not in trajectory.facts.parameters]
    require_still(trajectory, frozen, len(before) + 1)
    carried = [name for name in shared if name in trained or name in frozen]
    first = last.first_step + last.trajectory.last_step
    return StageSetup(
        module, task, trajectory, tuple(trained), tuple(frozen), tuple(carried), run, first
    )


def _with_base_of(
    before: Trajectory, after: Trajectory, module: nn.Module, names: Sequence[str]
) -> Trajectory:
    """A stage on a frozen base that is the end of the stage before it, with that base."""
    end = before.checkpoints[before.last_step]
    own = plain_parameters(module)
    ends = {
        n: value.to(own[n].dtype)  # a later stage may be in another precision
        for n, value in {**end.buffers, **end.parameters}.items()
        if n in own and n in names
    }
    base = dict(after.facts.base)
    shared = {n: value for n, value in ends.items() if base.get(n) == digest(value.detach())}
    if not shared:
        return after
    facts = replace(after.facts, base={n: own for n, own in base.items() if n not in shared})
    return replace(after, facts=facts, checkpoints=_OnBase(after.checkpoints, shared))


@dataclass(frozen=True, eq=False)
class _OnBase(Mapping[int, Checkpoint]):
    """Checkpoints of adapters with tensors of the base."""

    adapters: Mapping[int, Checkpoint]
    base: Mapping[str, Tensor]

    def __getitem__(self, step: int) -> Checkpoint:
        own = self.adapters[step]
        return replace(own, buffers={**self.base, **own.buffers})

    def __iter__(self) -> Iterator[int]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)


def require_continuous(
    before: Trajectory, after: Trajectory, names: Sequence[str], number: int
) -> None:
    """Refuse a stage that does not start where stage ``number``, the one before it, ended."""
    if 0 not in after.checkpoints:
        raise TrajectoryMismatchError(
            f"Stage {number + 1} has no checkpoint of its initial weights, so it cannot be seen to "
            f"start where stage {number} ended. Record it from its first step."
        )
    end, start = before.checkpoints[before.last_step], after.checkpoints[0]
    ends = {**end.buffers, **end.parameters}
    starts = {**start.buffers, **start.parameters}
    for name in names:
        if name in after.facts.base:
            raise TrajectoryMismatchError(
                f"{name} at the end of stage {number} (step {before.last_step}) is not the frozen "
                f"weight that stage {number + 1} was trained on: they are not consecutive stages "
                "of one training. Give trajectories of which each starts from the last weights of "
                "the one before."
            )
        if name not in starts or name not in ends:
            where = f"stage {number}" if name not in ends else f"stage {number + 1}"
            raise TrajectoryMismatchError(
                f"The checkpoints of {where} hold no {name}, which the other stage has. Record "
                "the run again with this version."
            )
        # A later stage may train in another precision.
        ended = ends[name].to(starts[name].dtype)
        if not torch.equal(ended, starts[name]):
            difference = float((ended - starts[name]).abs().max())
            raise TrajectoryMismatchError(
                f"{name} differs between the end of stage {number} (step {before.last_step}) and "
                f"the start of stage {number + 1}, by up to {difference:.3g}: they are not "
                "consecutive stages of one training. Give trajectories of which each starts from "
                "the last weights of the one before; a parameter that was initialised anew "
                f"belongs into fresh=[{name.rpartition('.')[0] or name!r}]."
            )


def require_still(trajectory: Trajectory, frozen: Sequence[str], number: int) -> None:
    """Refuse a stage that moved a parameter without training it."""
    start, end = trajectory.checkpoints[0].buffers, trajectory.checkpoints[trajectory.last_step]
    for name in frozen:
        if not torch.equal(start[name], end.buffers[name]):
            raise TrajectoryMismatchError(
                f"{name} was frozen in stage {number} (requires_grad was False), and expected to "
                "stay as it was, but it moved: an optimizer goes on stepping a parameter whose "
                "gradient is zero instead of None. Freeze with zero_grad(set_to_none=True), "
                "Lightning's default, and train again."
            )


def training_sets(train: object, runs: int) -> list[object]:
    """The training set of each recorded run; a single one serves all."""
    if runs == 1:
        return [train]
    if not isinstance(train, list | tuple):
        return [train] * runs
    if len(train) != runs or not all(
        isinstance(one, (DataLoader, ExampleSource))
        or is_data_module(one)
        or (hasattr(one, "__getitem__") and hasattr(one, "__len__"))
        for one in train
    ):
        raise ValueError(
            f"train must be one data set, or a list of one for each of the {runs} trajectories, "
            f"got {len(train)}."
        )
    return list(train)


def widened(context: Session, frozen: Sequence[str], batch: object, examples: Tensor) -> Session:
    """The same stage with gradients for its frozen parameters as well.

    Raises:
        EngineError: the module runs its frozen part without gradients: it would count for nothing.
    """
    engine = GradientEngine(context.module, [*context.engine.names, *frozen])
    engine.discover(context.train_loss, batch, examples, context.task.one_by_one)
    gradients = engine.plain_gradient(context.train_loss, batch, examples)
    unseen = [name for name in frozen if not bool(gradients[name].any())]
    if len(unseen) == len(frozen):
        raise EngineError(
            f"The loss does not depend on any frozen parameter ({', '.join(frozen)}) as far as "
            "autograd can see, so no score could reach the stage that trained them. Freeze by "
            "requires_grad=False, without torch.no_grad() or detach() in the module."
        )
    if unseen:
        context.task.notes.append(
            f"The loss does not depend on the frozen parameters {', '.join(unseen)} as far as "
            "autograd can see: scores pass through the others only."
        )
    return replace(context, engine=engine)
