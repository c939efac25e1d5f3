"""Writes a trajectory so that a kill at any instant leaves a readable one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tda_lightning.errors import TrajectoryExistsError
from tda_lightning.store import layout
from tda_lightning.store.fingerprint import digest
from tda_lightning.store.h5 import put_array, put_json, put_tensors, writing
from tda_lightning.store.randomness import json_states, tensor_states
from tda_lightning.store.reader import join_steps, read_steps
from tda_lightning.store.statistics_folder import write_statistics
from tda_lightning.trajectory import Checkpoint, Facts, Statistics, Steps


class TrajectoryWriter:
    """Appends steps and checkpoints to the trajectory in folder ``path``.

    Steps go to disk before the checkpoint that they lead to, so that every finished checkpoint
    has its history. A finished file is never written into, at most replaced by a whole one.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path)
        self._num_steps = 0
        self._initial: dict[str, str] = {}  # digests of the buffers in checkpoint 0

    @property
    def num_steps(self) -> int:
        """Steps on disk."""
        return self._num_steps

    def require_vacant(self) -> None:
        """Check that nothing of a recording is in the folder.

        Raises:
            TrajectoryExistsError: something is.
        """
        if self.root.exists() and not self.root.is_dir():
            raise TrajectoryExistsError(
                f"{self.root} is a file, expected a folder for the trajectory. Choose another path."
            )
        if found := layout.recorded_files(self.root):
            raise TrajectoryExistsError(
                f"{self.root} already holds a trajectory ({found[0].relative_to(self.root)} and "
                f"{len(found) - 1} more files); expected an empty or new folder. Choose another "
                "path, or pass overwrite=True to replace it."
            )

    def begin(self, facts: Facts, initial: Checkpoint, *, overwrite: bool = False) -> None:
        """Write the initial weights, then the facts: from then on the folder is a trajectory."""
        if overwrite:
            # The facts go first: a half-removed folder must not look like a whole trajectory.
            for path in layout.recorded_files(self.root):
                path.unlink()
        else:
            self.require_vacant()
        self._initial = {name: digest(buffer) for name, buffer in initial.buffers.items()}
        self._write_checkpoint(initial)
        self.write_facts(facts)

    def write_facts(self, facts: Facts) -> None:
        with writing(self.root / layout.FACTS_FILE, "trajectory") as file:
            put_json(file, layout.FACTS, asdict(facts))

    def append(self, steps: Steps) -> None:
        """Write ``steps``, which follow those already on disk; offsets count from 0."""
        if len(steps):
            first, last = self._num_steps + 1, self._num_steps + len(steps)
            self._write_steps(first, last, steps)
            self._num_steps = last

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write ``checkpoint``; the steps that lead to it must be on disk."""
        assert checkpoint.step <= self._num_steps, (checkpoint.step, self._num_steps)
        changed = {
            name: buffer
            for name, buffer in checkpoint.buffers.items()
            if self._initial.get(name) != digest(buffer)
        }
        self._write_checkpoint(
            Checkpoint(checkpoint.step, checkpoint.parameters, changed, checkpoint.optimizer)
        )

    def write_statistics(self, start: int, stop: int, statistics: Statistics) -> None:
        """Write the curvature summed over the steps ``start`` < step <= ``stop``."""
        write_statistics(self.root, start, stop, statistics)

    def finish(self) -> None:
        """Join the files of steps into one: one file opens faster than many."""
        blocks = layout.steps_files(self.root)
        if len(blocks) < 2:
            return
        steps = join_steps([read_steps(path, last - first + 1) for first, last, path in blocks])
        self._write_steps(1, self._num_steps, steps)
        for _, _, path in blocks:
            # A kill before this line leaves files that the joined one covers: readers skip them.
            path.unlink()

    def _write_steps(self, first: int, last: int, steps: Steps) -> None:
        with writing(layout.steps_file(self.root, first, last), "steps") as file:
            for column in layout.STEP_COLUMNS:
                put_array(file, column, getattr(steps, column).numpy(), compress=True)
            group = file.create_group(layout.HYPERPARAMETERS)
            for name, values in steps.hyperparameters.items():
                put_array(group, layout.encode(name), values.numpy(), compress=True)

    def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        path = layout.checkpoint_file(self.root, checkpoint.step)
        with writing(path, "checkpoint") as file:
            file.attrs[layout.STEP] = checkpoint.step
            put_tensors(file.create_group(layout.PARAMETERS), checkpoint.parameters)
            put_tensors(file.create_group(layout.BUFFERS), checkpoint.buffers)
            if checkpoint.optimizer is not None:
                states = file.create_group(layout.OPTIMIZER)
                for name, state in checkpoint.optimizer.items():
                    put_tensors(states.create_group(layout.encode(name)), state)
            generators = file.create_group(layout.RANDOM)
            put_tensors(generators, tensor_states())
            for name, state in json_states().items():
                put_json(generators, name, state)
