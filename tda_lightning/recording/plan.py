"""How much disk and memory a recording will take, before it begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from tda_lightning.curvature.sides import limits, side_form
from tda_lightning.gradients.moments import FULL
from tda_lightning.recording.curvature_statistics import OnlineCurvature
from tda_lightning.recording.dry_run import DryRun, dry_run
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

# Likewise of files of 1 to 40 blocks: an empty one, and what every block adds.
_STATISTICS, _BLOCK = 400, 2_100
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NOTE = (
    "The size of curvature statistics is told from the kinds of modules. Before the first batch "
    "nothing is known of parameters that are used elsewhere too (an embedding's weights as a "
    "head), nor of the activations of a watched step."
)

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
        notes.append(_NOTE)
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


# The statistics of an interval. Only a batch shows how each parameter is used; before it, each
# counts as used in the way of the module that holds it.


@dataclass(frozen=True)
class PlannedBlock:
    """One block of parameters.

    Attributes:
        groups, rows, columns: its shape.
        one_hot: its row side is kept as a diagonal.
        factored: its gradient is a product of inputs and output gradients.
    """

    groups: int
    rows: int
    columns: int
    one_hot: bool = False
    factored: bool = True

    def numbers(self, dense_side: int | None, *, packed: bool) -> int:
        """Numbers of its sums; ``packed``: of a symmetric matrix the triangle."""
        factored, unfactored, rank = limits(dense_side)
        limit = factored if self.factored else unfactored
        total = self.groups + 4  # count; trace, examples and samples
        for width, diagonal in ((self.rows, self.one_hot), (self.columns, False)):
            if diagonal:
                size = width
            elif side_form(width, limit, rank) != FULL:
                size = width * (rank + 1)
            else:
                size = width * (width + 1) // 2 if packed else width * width
            total += self.groups * size
        return total


class StatisticsSize(NamedTuple):
    """Bytes of the statistics of one interval, on disk and as sums in memory."""

    file: int
    sums: int


def statistics_size(
    settings: OnlineCurvature, module: nn.Module, trained: Mapping[str, Tensor]
) -> StatisticsSize:
    """The size of what is gathered of the parameters ``trained``."""
    blocks = list(planned_blocks(module, trained))
    width = torch.finfo(settings.dtype).bits // 8
    packed, whole = (
        width * sum(block.numbers(settings.dense_side, packed=packed) for block in blocks)
        for packed in (True, False)
    )
    return StatisticsSize(_STATISTICS + _BLOCK * len(blocks) + packed, whole)


def planned_blocks(module: nn.Module, trained: Mapping[str, Tensor]) -> Iterator[PlannedBlock]:
    """The blocks of parameters used as the modules that hold them use them."""
    named = dict(module.named_parameters())
    waiting = {id(named[name]): tuple(trained[name].shape) for name in trained}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((part, name))
    for places in holders.values():
        part, name = places[0]
        parameter = getattr(part, name)
        if id(parameter) not in waiting or _is_partner(part, name, waiting, holders):
            continue
        shape = waiting[id(parameter)]
        bias = _partner(part, name)
        joined = bias is not None and id(bias) in waiting and len(holders[id(bias)]) == 1
        yield _block(part, shape, math.prod(bias.shape) if joined else 0, tied=len(places) > 1)  # type: ignore[union-attr]


def _partner(part: nn.Module, name: str) -> nn.Parameter | None:
    """The bias that belongs to weight ``name``: weight and bias, weight_ih_l0 and bias_ih_l0."""
    if "weight" not in name:
        return None
    return getattr(part, name.replace("weight", "bias"), None)


def _is_partner(
    part: nn.Module,
    name: str,
    waiting: Mapping[int, object],
    holders: Mapping[int, list[tuple[nn.Module, str]]],
) -> bool:
    """Whether parameter ``name`` is the bias of a weight that is trained, and of no other."""
    weight = getattr(part, name.replace("bias", "weight"), None) if "bias" in name else None
    return (
        weight is not None and id(weight) in waiting and len(holders[id(getattr(part, name))]) == 1
    )


def _block(part: nn.Module, shape: tuple[int, ...], bias: int, tied: bool) -> PlannedBlock:
    if len(shape) < 2 or isinstance(part, _NORMS):
        return PlannedBlock(1, 1, math.prod(shape) + bias, factored=False)
    groups = part.groups if isinstance(part, _ConvNd) else 1
    rows, columns = shape[0] // groups, math.prod(shape[1:]) + bool(bias)
    embedding = isinstance(part, (nn.Embedding, nn.EmbeddingBag))
    # Used in two ways, it has no factors: unless both are alike, such as a layer held twice.
    layer = isinstance(part, (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase))
    factored = layer or (embedding and not tied)
    return PlannedBlock(groups, rows, columns, embedding and not tied, factored)
