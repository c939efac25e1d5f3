"""Writes a trajectory that stays readable if the process is killed at any instant."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from tda_lightning.records.curvature_statistics import Statistics
from tda_lightning.records.errors import TrajectoryExistsError, UnsupportedTrainingError
from tda_lightning.records.trajectory import Checkpoint, Facts, Steps
from tda_lightning.runtime.digests import digest
from tda_lightning.store import layout
from tda_lightning.store.atomic_write import make_folder, sync_folder
from tda_lightning.store.hdf5 import (
    get_tensors,
    put_array,
    put_json,
    put_tensors,
    reading,
    subgroup,
    writing,
)
from tda_lightning.store.reader import CheckpointFolder
from tda_lightning.store.statistics_folder import write_statistics
from tda_lightning.store.step_arrays import joined
from tda_lightning.store.steps_file import read_steps, write_steps
from tda_lightning.store.truncate import remove_unfinished, truncate_trajectory
from tda_lightning.store.untrusted import has, names


class TrajectoryWriter:
    """Appends steps and checkpoints to the trajectory in folder ``path``.

    Steps go to disk before the checkpoint that they lead to, so every finished checkpoint has its
    history. A finished file is never written into, only replaced as a whole. What a method has
    written when it returns survives a loss of power. A folder that vanishes during recording is an
    ``OSError`` and is not made again, as it would hold only a part of a trajectory.

    Args:
        data_weights: of a what-if run, [train].
    """

    def __init__(self, path: str | Path, data_weights: Tensor | None = None) -> None:
        self.root = Path(path)
        self._data_weights = data_weights
        self._num_steps = 0
        self._initial: dict[str, str] = {}  # digests of the buffers in checkpoint 0
        self._base: set[str] = set()  # names of the frozen weights that it lacks
        self._facts = b""  # content of the file of facts: whose folder it is

    @property
    def num_steps(self) -> int:
        """Steps on disk."""
        return self._num_steps

    def require_vacant(self) -> None:
        """Check that the folder holds no part of a recording.

        Raises:
            TrajectoryExistsError: it does.
        """
        if self.root.exists() and not self.root.is_dir():
            raise TrajectoryExistsError(
                f"{self.root} is a file, expected a folder for the trajectory. Choose another path."
            )
        if files := layout.recorded_files(self.root):
            raise TrajectoryExistsError(
                f"{self.root} already holds a trajectory ({files[0].relative_to(self.root)} and "
                f"{len(files) - 1} more files); expected an empty or new folder. Choose another "
                "path, or pass overwrite=True to replace it."
            )

    def begin(self, facts: Facts, initial: Checkpoint, *, overwrite: bool = False) -> None:
        """Write the initial weights, then the facts: from then on the folder is a trajectory."""
        if overwrite:
            # The facts go first: a half-removed folder must not look like a whole trajectory.
            for path in layout.recorded_files(self.root):
                path.unlink()
                if path.parent == self.root:
                    sync_folder(self.root)
        else:
            self.require_vacant()
        remove_unfinished(self.root)
        for folder in (layout.STEPS_FOLDER, layout.CHECKPOINTS_FOLDER):
            make_folder(self.root / folder)
        self._num_steps = 0
        self._remember(initial, facts)
        self._write_checkpoint(initial)
        self._write_facts(facts)

    def resume(self, facts: Facts, rows: int, checkpoints: Collection[int]) -> None:
        """Continue the trajectory in the folder after its first ``rows`` steps.

        Later steps, checkpoints that are not listed, and all cached tensors are removed.
        """
        truncate_trajectory(self.root, facts, rows, checkpoints)
        self._num_steps = rows
        self._facts = (self.root / layout.FACTS_FILE).read_bytes()
        self._remember(CheckpointFolder(self.root, facts)[0], facts)

    def _remember(self, initial: Checkpoint, facts: Facts) -> None:
        own = {name: digest(b.detach()) for name, b in initial.buffers.items()}
        self._initial, self._base = {**facts.base, **own}, set(facts.base)

    def keep_base(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors of the base into the checkpoint of the initial weights: they are trained from
        now on.

        Raises:
            UnsupportedTrainingError: they are not as they were in the beginning.
        """
        self._require_there()
        self._require_as_before({name: digest(t.detach()) for name, t in tensors.items()})
        with reading(layout.checkpoint_file(self.root, 0), layout.CHECKPOINT) as file:
            stored = {
                kind: get_tensors(subgroup(file, kind))
                for kind in (layout.PARAMETERS, layout.BUFFERS, layout.RANDOM)
                if has(file, kind)
            }
            states = None
            if has(file, layout.OPTIMIZER):
                group = subgroup(file, layout.OPTIMIZER)
                states = {layout.decode(n): get_tensors(subgroup(group, n)) for n in names(group)}
        buffers = {**stored[layout.BUFFERS], **{n: t.detach() for n, t in tensors.items()}}
        parameters, random = stored[layout.PARAMETERS], stored.get(layout.RANDOM)
        self._write_checkpoint(Checkpoint(0, parameters, buffers, states, random))
        self._base -= set(tensors)

    def _require_as_before(self, digests: Mapping[str, str]) -> None:
        for name, found in digests.items():
            if name in self._base and found != self._initial[name]:
                raise UnsupportedTrainingError(
                    f"{name} is frozen, and expected to stay as it was when the recording began, "
                    "but it changed: a trajectory holds no copy of a frozen base larger than what "
                    "is trained. Load the base that the run began with, or hand what changes to "
                    "the optimizer."
                )

    def _require_there(self) -> None:
        """Check that the folder still holds this recording."""
        os.stat(layout.checkpoint_file(self.root, 0))
        if (self.root / layout.FACTS_FILE).read_bytes() != self._facts:
            raise FileNotFoundError(
                errno.ENOENT, "the trajectory was replaced by another one", str(self.root)
            )

    def write_facts(self, facts: Facts) -> None:
        """Replace the facts."""
        self._require_there()
        self._write_facts(facts)

    def _write_facts(self, facts: Facts) -> None:
        with writing(self.root / layout.FACTS_FILE, layout.TRAJECTORY) as file:
            put_json(file, layout.FACTS, asdict(facts))
            if self._data_weights is not None:
                weights = self._data_weights.double().cpu().numpy()
                put_array(file, layout.DATA_WEIGHTS, weights)
        self._facts = (self.root / layout.FACTS_FILE).read_bytes()

    def append(self, steps: Steps) -> None:
        """Write ``steps``, which follow those already on disk; offsets count from 0."""
        if len(steps):
            self._require_there()
            write_steps(self.root, self._num_steps + 1, steps)
            self._num_steps += len(steps)

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write ``checkpoint``; the steps that lead to it must be on disk."""
        assert checkpoint.step <= self._num_steps, (checkpoint.step, self._num_steps)
        self._require_there()
        digests = {name: digest(b.detach()) for name, b in checkpoint.buffers.items()}
        self._require_as_before(digests)
        changed = {
            name: buffer
            for name, buffer in checkpoint.buffers.items()
            if self._initial.get(name) != digests[name]
        }
        self._write_checkpoint(replace(checkpoint, buffers=changed))

    def write_statistics(self, start: int, stop: int, statistics: Statistics) -> None:
        """Write the curvature summed over the steps ``start`` < step <= ``stop``."""
        self._require_there()
        make_folder(self.root / layout.STATISTICS_FOLDER)
        write_statistics(self.root, start, stop, statistics)

    def finish(self) -> None:
        """Join the files of steps into one, which opens faster."""
        self._require_there()
        blocks = layout.steps_files(self.root)
        if len(blocks) < 2:
            return
        steps = joined([read_steps(path, last - first + 1) for first, last, path in blocks])
        write_steps(self.root, 1, steps)
        for _, _, path in blocks:
            # If the process is killed here, readers skip the files that the joined one covers.
            path.unlink()
        sync_folder(self.root / layout.STEPS_FOLDER)

    def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        path = layout.checkpoint_file(self.root, checkpoint.step)
        with writing(path, layout.CHECKPOINT) as file:
            file.attrs[layout.STEP] = checkpoint.step
            put_tensors(file.create_group(layout.PARAMETERS), checkpoint.parameters)
            put_tensors(file.create_group(layout.BUFFERS), checkpoint.buffers)
            if checkpoint.optimizer is not None:
                states = file.create_group(layout.OPTIMIZER)
                for name, state in checkpoint.optimizer.items():
                    put_tensors(states.create_group(layout.encode(name)), state)
            if checkpoint.random is not None:
                put_tensors(file.create_group(layout.RANDOM), checkpoint.random)
