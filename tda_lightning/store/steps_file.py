"""Writes a file of the steps table; :func:`tda_lightning.store.reader.read_steps` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from tda_lightning.records.trajectory import Steps
from tda_lightning.store import layout
from tda_lightning.store.hdf5 import put_array, writing


def write_steps(root: Path, first: int, steps: Steps) -> Path:
    """Write ``steps``, the first of which is step ``first`` of the run; offsets count from 0."""
    path = layout.steps_file(root, first, first + len(steps) - 1)
    with writing(path, "steps") as file:
        for column in layout.STEP_COLUMNS:
            put_array(file, column, getattr(steps, column).numpy(), compress=True)
        group = file.create_group(layout.HYPERPARAMETERS)
        for name, values in steps.hyperparameters.items():
            put_array(group, layout.encode(name), values.numpy(), compress=True)
        if steps.random:
            _put_random(file.create_group(layout.RANDOM), steps.random)
    return path


def _put_random(group: h5py.Group, random: Mapping[int, Mapping[str, Tensor]]) -> None:
    """By generator: CUDA's come in where it is first used."""
    for name in sorted({name for states in random.values() for name in states}):
        batches = sorted(batch for batch, states in random.items() if name in states)
        table = torch.stack([random[batch][name] for batch in batches])
        part = group.create_group(layout.encode(name))
        put_array(part, layout.RANDOM_BATCHES, np.array(batches, np.int64), compress=True)
        put_array(part, layout.RANDOM_STATES, table.numpy(), compress=True)
