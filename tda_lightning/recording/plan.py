"""How much disk and memory a recording will take, before it begins."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from tda_lightning.recording.dry_run import DryRun, dry_run
from tda_lightning.recording.statistics_size import NOTE, planned_curvature
from tda_lightning.recording.step_count import PlannedSteps, planned_steps
from tda_lightning.runtime.formatting import readable_bytes
from tda_lightning.store.layout import STEP_COLUMNS

if TYPE_CHECKING:
    from tda_lightning.recording.recorder import TrajectoryRecorder

# Measured on files of 0 to 100 tensors: an empty checkpoint with the states of the generators,
# and what every tensor and every parameter's group of optimizer state adds.
_FILE, _TENSOR, _GROUP = 16_500, 290, 200
_RANDOM = 15_100  # states of torch's, Python's and NumPy's generator
_FACTS = 12_000  # the facts, and per parameter:
_FACT = 90
_ROW_OBJECTS = 1_500  # Python objects of a step that is not yet on disk
_PENDING_ROWS = 10_000  # more are written at once
_CHUNK = 1 << 22  # what HDF5 copies at a time


@dataclass(frozen=True)
class PlanItem:
    """Something that takes disk or memory.

    Attributes:
        name: what it is.
        bytes: size of one; None where it cannot be told beforehand.
        count: how many there are; None where that cannot be told.
    """

    name: str
    bytes: int | None
    count: int | None = 1

    @property
    def total(self) -> int | None:
        """Size of all."""
        return None if self.bytes is None or self.count is None else self.bytes * self.count


@dataclass(frozen=True)
class RecordingPlan:
    """What a recording will take, in bytes; printed by rich, it is a table.

    Attributes:
        steps: optimizer steps of the run; None when not known.
        checkpoints: how many are written, the initial weights included; None when not known.
        disk: what lies on disk in the end. Steps are counted uncompressed: an upper bound.
        memory: what is held besides the training, at most.
        notes: what could not be told, and why.
    """

    steps: int | None
    checkpoints: int | None
    disk: tuple[PlanItem, ...]
    memory: tuple[PlanItem, ...]
    notes: tuple[str, ...] = ()

    @property
    def disk_bytes(self) -> int | None:
        """Everything on disk; None when a part of it is not known."""
        return _sum(self.disk)

    @property
    def memory_bytes(self) -> int | None:
        """Everything in memory."""
        return _sum(self.memory)

    @property
    def checkpoint_bytes(self) -> int | None:
        """One checkpoint with everything that the recorder is to keep in it."""
        return _sum([PlanItem(i.name, i.bytes) for i in self.disk if i.name in _IN_A_CHECKPOINT])

    def __rich__(self) -> RenderableType:
        known = "unknown" if self.steps is None else f"{self.steps:,}"
        table = Table("", "size", "number", "total", title=f"Recording of {known} steps")
        for column in table.columns[1:]:
            column.justify = "right"
        for title, items in (("disk", self.disk), ("memory", self.memory)):
            table.add_section()
            for item in items:
                count = "unknown" if item.count is None else str(item.count)
                table.add_row(escape(item.name), _shown(item.bytes), count, _shown(item.total))
            table.add_row(f"[bold]{title}[/bold]", "", "", _shown(_sum(items)))
        one = f"One checkpoint: {_shown(self.checkpoint_bytes)}."
        return Group(table, one, *(escape(note) for note in self.notes))


PARAMETERS = "parameters"
STATE = "optimizer state"
MOVING = "buffers of normalization layers"
FIXED = "other buffers and frozen parameters, where they stay as they are"
STRUCTURE = "file structure and random states"
STEPS = "steps table, before compression"
JUMPS = "random states, once in an epoch, before compression"
STATISTICS = "curvature statistics of an interval"
SUMS = "curvature sums, of the interval, the step and the batch"
_IN_A_CHECKPOINT = (PARAMETERS, STATE, MOVING, STRUCTURE)


def plan_recording(
    recorder: TrajectoryRecorder, module: LightningModule, trainer: Trainer, train: Any
) -> RecordingPlan:
    """See :meth:`tda_lightning.TrajectoryRecorder.plan`."""
    steps = planned_steps(trainer, module, train)
    found = dry_run(module, trainer, steps.total)
    notes = [*steps.notes, *found.notes]
    kept = _checkpoints(recorder, steps)
    count = None if kept is None else len(kept) + 1
    if kept is None and recorder.every_n_steps is None and recorder.every_n_epochs is None:
        notes.append(f"There are at most {recorder.num_checkpoints + 1} checkpoints.")
    every = int(recorder.save_optimizer)
    with_state = 0
    if every and kept is not None:
        # Every k-th, and the last; the initial weights have no state yet.
        with_state = len(kept) // every + bool(len(kept) % every)
    moving, fixed = _buffers(module, found)
    disk = [
        PlanItem(PARAMETERS, _bytes(found.trained.values()), count),
        PlanItem(MOVING, _bytes(moving), count),
        PlanItem(FIXED, _bytes(fixed), 1),
    ]
    if every:
        number = None if kept is None else with_state
        disk.insert(1, PlanItem(STATE, found.state_bytes, number))
    tensors = len(found.trained) + len(moving) + (found.state_tensors if every else 0)
    groups = len(found.trained) if every else 0
    structure = _FILE + _TENSOR * tensors + _GROUP * groups
    row = _row_bytes(found, steps)
    disk += [
        PlanItem(STRUCTURE, structure, count),
        PlanItem(STEPS, row, steps.total),
        *([PlanItem(JUMPS, _RANDOM, _epochs(steps))] if trainer.world_size == 1 else []),
        PlanItem("facts of the run", _FACTS + _FACT * len(found.trained)),
    ]
    memory = _memory(found, kept, steps, row)
    if recorder.curvature is not None:
        curvature = planned_curvature(recorder.curvature, module, found.trained)
        by_epochs = recorder.every_n_epochs is not None
        spread = set() if by_epochs or kept is None else set(kept)
        by_steps = recorder.every_n_steps
        watched = recorder.curvature.watching(spread if by_steps is None else {by_steps}).every
        gathering = None if kept is None or watched is None else _gathering(kept, watched)
        disk.append(PlanItem(STATISTICS, curvature.file, gathering))
        memory.append(PlanItem(SUMS, curvature.sums, 3))
        notes.append(NOTE)
    return RecordingPlan(steps.total, count, tuple(disk), tuple(memory), tuple(notes))


def _checkpoints(recorder: TrajectoryRecorder, steps: PlannedSteps) -> list[int] | None:
    """Steps after which a checkpoint is kept, as ``should_record`` of a subclass has it."""
    total = steps.total
    if total is None:
        return None
    asked = copy.copy(recorder)
    by_number = recorder.every_n_steps is None and recorder.every_n_epochs is None
    number = recorder.num_checkpoints
    spread = {i * total // number for i in range(1, number + 1)} - {0} if by_number else set()
    asked._schedule = frozenset(spread)
    kept = {step for step in range(1, total + 1) if asked.should_record(step)} | {total}
    if recorder.every_n_epochs is not None:
        if steps.per_epoch is None:
            return None
        kept |= set(range(0, total + 1, steps.per_epoch * recorder.every_n_epochs))
    return sorted(kept - {0})


def _buffers(module: nn.Module, found: DryRun) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that training moves without an optimizer, and the others that are not trained."""
    moving = {
        id(buffer)
        for part in module.modules()
        if getattr(part, "track_running_stats", False) and part.training
        for buffer in part.buffers(recurse=False)
    }
    names = {name: id(buffer) in moving for name, buffer in module.named_buffers()}
    return (
        [found.others[name] for name in found.others if names.get(name, False)],
        [found.others[name] for name in found.others if not names.get(name, False)],
    )


def _epochs(steps: PlannedSteps) -> int:
    """Epochs that are begun. There is one at least."""
    known = steps.total is not None and steps.per_epoch
    return math.ceil(steps.total / steps.per_epoch) if known else 1  # type: ignore[operator]


def _row_bytes(found: DryRun, steps: PlannedSteps) -> int:
    """One row of the steps table with its batches' example indices."""
    plain = len([name for name in STEP_COLUMNS if name not in ("learning_rate", "examples")])
    settings = found.num_groups * (1 + found.num_hyperparameters)
    batches = steps.accumulation
    return 8 * (plain + settings + batches + batches * (steps.batch_size or 0))


def _memory(found: DryRun, kept: list[int] | None, steps: PlannedSteps, row: int) -> list[PlanItem]:
    """What is held between two checkpoints and while one is written."""
    tensors = [*found.trained.values(), *found.others.values()]
    largest = max((_bytes([tensor]) for tensor in tensors), default=0)
    # Tensors are written one by one: as they lie in memory, or after a copy from an accelerator.
    on_host = found.on_host
    items = [
        PlanItem("HDF5's chunk", 2 * min(_CHUNK, largest)),
        PlanItem("rows of steps not yet written", row + _ROW_OBJECTS, _gap(kept, steps.total)),
    ]
    return items if on_host else [PlanItem("largest tensor, copied to the host", largest), *items]


def _gathering(kept: list[int], every: int) -> int:
    """Intervals between checkpoints in which a step is watched; the files of others are empty."""
    ends = [0, *kept]
    return sum(b // every > a // every for a, b in zip(ends, ends[1:], strict=False))


def _gap(kept: list[int] | None, total: int | None) -> int | None:
    """Most steps between two checkpoints, which are written together."""
    if kept is None:
        return None if total is None else min(total, _PENDING_ROWS)
    ends = [0, *kept]
    longest = max((b - a for a, b in zip(ends, ends[1:], strict=False)), default=0)
    return min(longest, _PENDING_ROWS)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _sum(items: Sequence[PlanItem]) -> int | None:
    totals = [item.total for item in items]
    return None if any(total is None for total in totals) else sum(t for t in totals if t)


def _shown(size: int | None) -> str:
    return "unknown" if size is None or not math.isfinite(size) else readable_bytes(size)
