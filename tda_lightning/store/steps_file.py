"""Writes a file of the steps table; :func:`tda_lightning.store.reader.read_steps` reads it."""

from __future__ import annotations

from pathlib import Path

from tda_lightning.store import layout
from tda_lightning.store.h5 import put_array, writing
from tda_lightning.trajectory import Steps


def write_steps(root: Path, first: int, steps: Steps) -> Path:
    """Write ``steps``, the first of which is step ``first`` of the run; offsets count from 0."""
    path = layout.steps_file(root, first, first + len(steps) - 1)
    with writing(path, "steps") as file:
        for column in layout.STEP_COLUMNS:
            put_array(file, column, getattr(steps, column).numpy(), compress=True)
        group = file.create_group(layout.HYPERPARAMETERS)
        for name, values in steps.hyperparameters.items():
            put_array(group, layout.encode(name), values.numpy(), compress=True)
    return path
