"""A file of the steps table: writing it, and reading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tda_lightning.records.trajectory import Steps
from tda_lightning.runtime.random_state_forms import TWISTERS, require_forms
from tda_lightning.store import layout
from tda_lightning.store.hdf5 import get_array, put_array, reading, subgroup, writing
from tda_lightning.store.record_checks import require_values
from tda_lightning.store.step_arrays import StepArrays, as_tensors, joined, of_tensors
from tda_lightning.store.untrusted import has, names


def write_steps(root: Path, first: int, steps: Steps | StepArrays) -> Path:
    """Write ``steps``, the first of which is step ``first`` of the run; offsets count from 0.

    Returns:
        The file.
    """
    path = layout.steps_file(root, first, first + len(steps) - 1)
    with writing(path, layout.STEPS) as file:
        for column in layout.STEP_COLUMNS:
            put_array(file, column, np.asarray(getattr(steps, column)), compress=True)
        group = file.create_group(layout.HYPERPARAMETERS)
        for name, values in steps.hyperparameters.items():
            put_array(group, layout.encode(name), np.asarray(values), compress=True)
        if steps.random:
            _put_random(file.create_group(layout.RANDOM), steps.random)
    return path


def _put_random(group: h5py.Group, random: Mapping[int, Mapping[str, Any]]) -> None:
    """Grouped by generator: those of CUDA are there from where it is first used."""
    for name in sorted({name for states in random.values() for name in states}):
        batches = sorted(batch for batch, states in random.items() if name in states)
        table = np.stack([np.asarray(random[batch][name]) for batch in batches])
        part = group.create_group(layout.encode(name))
        put_array(part, layout.RANDOM_BATCHES, np.array(batches, np.int64), compress=True)
        put_array(part, layout.RANDOM_STATES, table, compress=True)


def read_steps(path: Path, count: int) -> StepArrays:
    """The ``count`` steps that file ``path`` holds; offsets count from 0."""
    with reading(path, layout.STEPS) as file:
        columns = {
            name: get_array(file, name, np.dtype(dtype))
            for name, dtype in layout.STEP_COLUMNS.items()
        }
        group = subgroup(file, layout.HYPERPARAMETERS)
        hyperparameters = {
            layout.decode(name): get_array(group, name, np.dtype("float64"))
            for name in names(group)
        }
        random = _read_random(subgroup(file, layout.RANDOM)) if has(file, layout.RANDOM) else {}
        steps = StepArrays(hyperparameters=hyperparameters, random=random, **columns)
        _check_steps(steps, count)
        require_values(steps)
        return steps


def _read_random(group: h5py.Group) -> dict[int, dict[str, np.ndarray]]:
    """States of the random generators by batch."""
    random: dict[int, dict[str, np.ndarray]] = {}
    for name in names(group):
        part = subgroup(group, name)
        dtype = np.dtype("int64" if name in TWISTERS else "uint8")
        batches = get_array(part, layout.RANDOM_BATCHES, np.dtype("int64"))
        table = get_array(part, layout.RANDOM_STATES, dtype)
        rising = batches.ndim == 1 and bool((batches[:-1] < batches[1:]).all())
        if not rising or len(table) != len(batches):
            raise ValueError(f"random states of {name} belong to no increasing batches")
        for batch, state in zip(batches.tolist(), table, strict=True):
            # Memory of its own: torch 2.13 crashes when it restores a row of a table.
            random.setdefault(batch, {})[layout.decode(name)] = state.copy()
    for states in random.values():
        require_forms(states)
    return dict(sorted(random.items()))


def _check_steps(steps: StepArrays, count: int) -> None:
    """Shapes fit each other, and offsets lead from 0 to the end without going back."""
    for column in ("epoch", "loss", "gradient_norm", "accumulation", "clipping"):
        if getattr(steps, column).shape != (count,):
            raise ValueError(f"column {column} does not hold {count} steps")
    shape = steps.learning_rate.shape
    if len(shape) != 2 or shape[0] != count:
        raise ValueError(f"column learning_rate has shape {list(shape)}")
    for name, values in steps.hyperparameters.items():
        if values.shape != shape:
            raise ValueError(f"hyper-parameter {name} has shape {list(values.shape)}")
    if steps.examples.ndim != 1:
        raise ValueError(f"column examples has shape {list(steps.examples.shape)}")
    _check_offsets(steps.batch_offsets, count + 1, len(steps.example_offsets) - 1)
    _check_offsets(steps.example_offsets, len(steps.example_offsets), len(steps.examples))
    if len(steps.examples) and int(steps.examples.min()) < 0:
        raise ValueError("negative example indices")
    if any(not 0 <= batch < len(steps.example_offsets) - 1 for batch in steps.random):
        raise ValueError(f"random states of other batches than {len(steps.example_offsets) - 1}")


def _check_offsets(offsets: np.ndarray, count: int, end: int) -> None:
    whole = offsets.ndim == 1 and len(offsets) == count >= 1
    whole = whole and int(offsets[0]) == 0 and int(offsets[-1]) == end
    # Differences come last: those between numbers of either sign may overflow.
    if not whole or bool((offsets < 0).any()) or bool((np.diff(offsets) < 0).any()):
        raise ValueError(f"offsets do not lead from 0 to {end}")


def join_steps(blocks: Sequence[Steps]) -> Steps:
    """Consecutive tables as one; parameter groups that a later one added have rate 0 before."""
    return as_tensors(joined([of_tensors(block) for block in blocks]))
