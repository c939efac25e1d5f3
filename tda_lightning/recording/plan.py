"""How much disk and memory a recording will take, before it begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from tda_lightning.recording.curvature_statistics import OnlineCurvature
from tda_lightning.recording.dry_run import DryRun, dry_run
from tda_lightning.recording.statistics_size import NOTE, statistics_size
from tda_lightning.recording.step_count import StepCount
from tda_lightning.records.plans import PlanItem, RecordingPlan
from tda_lightning.store.layout import STEP_COLUMNS

# Measured on files of 0 to 100 tensors: an empty checkpoint with the states of the generators,
# and what every tensor and every parameter's group of optimizer state adds.
_FILE, _TENSOR, _GROUP = 16_500, 290, 200
_RANDOM = 15_100  # states of torch's, Python's and NumPy's generator
_FACTS, _FACT = 12_000, 90  # the facts, and what each parameter adds
_ROW_OBJECTS = 1_500  # Python objects of a step that is not yet on disk
_ROWS_IN_MEMORY = 10_000  # more are written at once
_CHUNK = 1 << 22  # what HDF5 copies at a time

PARAMETERS = "parameters"
STATE = "optimizer state"
MOVING = "buffers of normalization layers"
FIXED = "other buffers and frozen parameters, where they stay as they are"
STRUCTURE = "file structure and random states"
STEPS = "steps table, before compression"
JUMPS = "random states, once in an epoch, before compression"
STATISTICS = "curvature statistics of an interval"
SUMS = "curvature sums, of the interval, the step and the batch"


def plan_recording(
    module: LightningModule,
    trainer: Trainer,
    steps: StepCount,
    checkpoints: Sequence[int] | None,
    save_optimizer: int,
    curvature: OnlineCurvature | None,
) -> RecordingPlan:
    """What a recording will take; see :meth:`tda_lightning.TrajectoryRecorder.plan`.

    Args:
        module: what will be trained.
        trainer: what will train it.
        steps: the length of the run.
        checkpoints: steps of those after the initial one, in order; None if not known.
        save_optimizer: every how many checkpoints hold the optimizer's state; 0 for none.
        curvature: of the statistics gathered in training, ``every`` being chosen if it can be;
            None for none.
    """
    run = dry_run(module, trainer, steps.total)
    count = None if checkpoints is None else len(checkpoints) + 1
    moving, fixed = _buffers(module, run)
    disk = [PlanItem(PARAMETERS, _bytes(run.trained.values()), count, in_checkpoint=True)]
    tensors, groups = len(run.trained) + len(moving), 0
    if save_optimizer:
        # Every k-th, and the last; the initial weights have no state yet.
        with_state = None if checkpoints is None else -(-len(checkpoints) // save_optimizer)
        disk.append(PlanItem(STATE, run.state_bytes, with_state, in_checkpoint=True))
        tensors, groups = tensors + run.state_tensors, len(run.trained)
    structure = _FILE + _TENSOR * tensors + _GROUP * groups
    row = _row_bytes(run, steps)
    disk += [
        PlanItem(MOVING, _bytes(moving), count, in_checkpoint=True),
        PlanItem(FIXED, _bytes(fixed), 1),
        PlanItem(STRUCTURE, structure, count, in_checkpoint=True),
        PlanItem(STEPS, row, steps.total),
        *([PlanItem(JUMPS, _RANDOM, steps.epochs)] if trainer.world_size == 1 else []),
        PlanItem("facts of the run", _FACTS + _FACT * len(run.trained)),
    ]
    largest = max((_bytes([t]) for t in (*run.trained.values(), *run.others.values())), default=0)
    rows = _longest_interval(checkpoints, steps.total)
    memory = [
        PlanItem("HDF5's chunk", 2 * min(_CHUNK, largest)),
        PlanItem("rows of steps not yet written", row + _ROW_OBJECTS, rows),
    ]
    if not run.on_host:
        # Tensors are copied from an accelerator and written one by one.
        memory.insert(0, PlanItem("largest tensor, copied to the host", largest))
    notes = [*steps.notes, *run.notes]
    if curvature is not None:
        size = statistics_size(curvature, module, run.trained)
        disk.append(PlanItem(STATISTICS, size.file, _watched_intervals(checkpoints, curvature)))
        memory.append(PlanItem(SUMS, size.sums, 3))
        notes.append(NOTE)
    return RecordingPlan(steps.total, count, tuple(disk), tuple(memory), tuple(notes))


def _buffers(module: nn.Module, run: DryRun) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that training moves without an optimizer, and the others that are not trained."""
    counting = {
        id(buffer)
        for part in module.modules()
        if getattr(part, "track_running_stats", False) and part.training
        for buffer in part.buffers(recurse=False)
    }
    moving = {name for name, buffer in module.named_buffers() if id(buffer) in counting}
    return (
        [tensor for name, tensor in run.others.items() if name in moving],
        [tensor for name, tensor in run.others.items() if name not in moving],
    )


def _row_bytes(run: DryRun, steps: StepCount) -> int:
    """One row of the steps table with its batches' example indices."""
    plain = len([name for name in STEP_COLUMNS if name not in ("learning_rate", "examples")])
    settings = run.num_groups * (1 + run.num_hyperparameters)
    return 8 * (plain + settings + steps.accumulation * (1 + (steps.batch_size or 0)))


def _intervals(checkpoints: Sequence[int]) -> list[tuple[int, int]]:
    ends = [0, *checkpoints]
    return list(zip(ends, ends[1:], strict=False))


def _watched_intervals(checkpoints: Sequence[int] | None, curvature: OnlineCurvature) -> int | None:
    """Intervals between checkpoints in which a step is watched; the files of others are empty."""
    every = curvature.every
    if checkpoints is None or every is None:
        return None
    return sum(stop // every > start // every for start, stop in _intervals(checkpoints))


def _longest_interval(checkpoints: Sequence[int] | None, total: int | None) -> int | None:
    """Most steps that are in memory before they are written."""
    if checkpoints is None:
        return None if total is None else min(total, _ROWS_IN_MEMORY)
    gaps = (stop - start for start, stop in _intervals(checkpoints))
    return min(max(gaps, default=0), _ROWS_IN_MEMORY)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
