"""How much disk and memory a recording will take, before it begins."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from tda_lightning.curvature.sides import limits, side_form
from tda_lightning.gradients.moments import FULL
from tda_lightning.recording.base_weights import base_of, frozen_names
from tda_lightning.recording.curvature_statistics import OnlineCurvature
from tda_lightning.recording.fit_preview import StepCount, dry_run
from tda_lightning.recording.step_table import ROWS_IN_MEMORY
from tda_lightning.records.plans import PlanItem, RecordingPlan
from tda_lightning.store.layout import STEP_COLUMNS

# Measured on files of 0 to 100 tensors: an empty checkpoint with the states of the generators,
# and what every tensor and every parameter's group of optimizer state adds.
_FILE, _TENSOR, _GROUP = 16_500, 290, 200
_RANDOM = 15_100  # states of torch's, Python's and NumPy's generator
_FACTS, _FACT = 12_000, 90  # the facts, and what each parameter adds
_ROW_OBJECTS = 1_500  # Python objects of a step that is not yet on disk
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
        curvature: settings of the statistics gathered in training; None for none.
    """
    run = dry_run(module, trainer, steps.total)
    count = None if checkpoints is None else len(checkpoints) + 1
    intervals = None if checkpoints is None else list(pairwise([0, *checkpoints]))
    counting = _counting(module)
    moving = [tensor for name, tensor in run.others.items() if name in counting]
    base = base_of(run.trained, run.others, frozen_names(module, run.trained))
    fixed = [
        tensor for name, tensor in run.others.items() if name not in counting and name not in base
    ]
    disk = [PlanItem(PARAMETERS, _bytes(run.trained.values()), count, in_checkpoint=True)]
    structure = _FILE + _TENSOR * (len(run.trained) + len(moving))
    if save_optimizer:
        # Every k-th, and the last; the initial weights have no state yet.
        with_state = None if checkpoints is None else -(-len(checkpoints) // save_optimizer)
        size = None if run.state is None else _bytes(run.state)
        disk.append(PlanItem(STATE, size, with_state, in_checkpoint=True))
        structure += _TENSOR * len(run.state or ()) + _GROUP * len(run.trained)
    # One row of the steps table, with the example indices of its batches.
    plain = len([name for name in STEP_COLUMNS if name not in ("learning_rate", "examples")])
    indices = steps.accumulation * (1 + (steps.batch_size or 0))
    row = 8 * (plain + run.settings_per_step + indices)
    disk += [
        PlanItem(MOVING, _bytes(moving), count, in_checkpoint=True),
        PlanItem(FIXED, _bytes(fixed), 1),
        PlanItem(STRUCTURE, structure, count, in_checkpoint=True),
        PlanItem(STEPS, row, steps.total),
        *([PlanItem(JUMPS, _RANDOM, steps.epochs)] if trainer.world_size == 1 else []),
        PlanItem("facts of the run", _FACTS + _FACT * len(run.trained)),
    ]
    largest = max((_bytes([t]) for t in (*run.trained.values(), *run.others.values())), default=0)
    # Rows are written with each checkpoint.
    longest = steps.total
    if intervals is not None:
        longest = max((stop - start for start, stop in intervals), default=0)
    rows = None if longest is None else min(longest, ROWS_IN_MEMORY)
    memory = [
        PlanItem("HDF5's chunk", 2 * min(_CHUNK, largest)),
        PlanItem("rows of steps not yet written", row + _ROW_OBJECTS, rows),
    ]
    if trainer.strategy.root_device.type != "cpu":
        # Tensors are copied from an accelerator and written one by one.
        memory.insert(0, PlanItem("largest tensor, copied to the host", largest))
    notes = [*steps.notes, *run.notes]
    if curvature is not None:
        blocks, every = list(_blocks(module, run.trained)), curvature.every
        width, side = curvature.dtype.itemsize, curvature.dense_side
        packed = width * sum(_numbers(block, side, packed=True) for block in blocks)
        sums = width * sum(_numbers(block, side, packed=False) for block in blocks)
        watched = None  # intervals in which a step is watched; the files of others are empty
        if intervals is not None and every is not None:
            watched = sum(stop // every > start // every for start, stop in intervals)
        disk.append(PlanItem(STATISTICS, _STATISTICS + _BLOCK * len(blocks) + packed, watched))
        memory.append(PlanItem(SUMS, sums, 3))
        notes.append(_NOTE)
    return RecordingPlan(steps.total, count, tuple(disk), tuple(memory), tuple(notes))


def _counting(module: nn.Module) -> set[str]:
    """Names of the buffers that training changes: running statistics."""
    ids = {
        id(buffer)
        for part in module.modules()
        if getattr(part, "track_running_stats", False) and part.training
        for buffer in part.buffers(recurse=False)
    }
    return {name for name, buffer in module.named_buffers() if id(buffer) in ids}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# The statistics of an interval. Only a batch shows how each parameter is used; before it, each
# counts as used in the way of the module that holds it.


class _Block(NamedTuple):
    """The shape of one block of parameters, and how it is used."""

    groups: int
    rows: int
    columns: int
    one_hot: bool  # its row side is kept as a diagonal
    factored: bool  # its gradient is a product of inputs and output gradients


def _numbers(block: _Block, dense_side: int | None, *, packed: bool) -> int:
    """Numbers in the block's sums; ``packed``: only the triangle of a symmetric matrix."""
    factored, unfactored, rank = limits(dense_side)
    limit = factored if block.factored else unfactored
    total = block.groups + 4  # count; trace, examples and samples
    for width, diagonal in ((block.rows, block.one_hot), (block.columns, False)):
        size = width * (width + 1) // 2 if packed else width * width
        if diagonal:
            size = width
        elif side_form(width, limit, rank) != FULL:
            size = width * (rank + 1)
        total += block.groups * size
    return total


def _blocks(module: nn.Module, trained: Mapping[str, Tensor]) -> Iterator[_Block]:
    """The blocks of ``trained``, each parameter being used as its module uses it."""
    waiting = {
        id(parameter): tuple(trained[name].shape)
        for name, parameter in module.named_parameters()
        if name in trained
    }
    modules = list(module.modules())
    holders = Counter(id(p) for part in modules for p in part.parameters(recurse=False))

    def joins(bias: nn.Parameter | None, weight: nn.Parameter | None) -> bool:
        both = id(bias) in waiting and id(weight) in waiting
        return both and holders[id(bias)] == 1

    seen = set()
    for part in modules:
        own = dict(part.named_parameters(recurse=False))
        for name, parameter in own.items():
            # A weight's partner is its bias (weight_ih_l0's bias_ih_l0), and the reverse.
            is_bias = "bias" in name
            bias = parameter if is_bias else own.get(name.replace("weight", "bias"))
            weight = own.get(name.replace("bias", "weight")) if is_bias else parameter
            joined = bias is not weight and joins(bias, weight)
            if id(parameter) in waiting and id(parameter) not in seen and not (is_bias and joined):
                size = bias.numel() if bias is not None and joined else 0
                tied = holders[id(parameter)] > 1
                yield _block(part, waiting[id(parameter)], size, tied)
            seen.add(id(parameter))


def _block(part: nn.Module, shape: tuple[int, ...], bias: int, tied: bool) -> _Block:
    if len(shape) < 2 or isinstance(part, _NORMS):
        return _Block(1, 1, math.prod(shape) + bias, one_hot=False, factored=False)
    groups = part.groups if isinstance(part, _ConvNd) else 1
    rows, columns = shape[0] // groups, math.prod(shape[1:]) + bool(bias)
    one_hot = isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and not tied
    # Used in two ways, it has no factors: unless both are alike, such as a layer held twice.
    layer = isinstance(part, (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase))
    return _Block(groups, rows, columns, one_hot, factored=layer or one_hot)
