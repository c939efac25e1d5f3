"""Reads a trajectory from its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from tda_lightning.records.deferred import Deferred
from tda_lightning.records.errors import TrajectoryFormatError, TrajectoryNotFoundError
from tda_lightning.records.trajectory import (
    Checkpoint,
    Facts,
    ParameterFact,
    StageFact,
    Trajectory,
    facts_up_to,
)
from tda_lightning.runtime.random_state_forms import require_forms
from tda_lightning.store import layout
from tda_lightning.store.ensemble_file import is_ensemble
from tda_lightning.store.hdf5 import (
    dtype_name,
    get_array,
    get_arrays,
    get_json,
    get_tensors,
    reading,
    subgroup,
)
from tda_lightning.store.record_checks import require_facts, require_fitting
from tda_lightning.store.statistics_folder import StatisticsFolder
from tda_lightning.store.step_arrays import StepArrays, as_tensors, joined, no_steps
from tda_lightning.store.steps_file import read_steps
from tda_lightning.store.tensor_cache import TensorCache
from tda_lightning.store.untrusted import get_integer, has, names

if TYPE_CHECKING:
    from torch import Tensor


def open_trajectory(path: str | Path) -> Trajectory:
    """The trajectory recorded in folder ``path``, up to its last finished checkpoint.

    Checkpoints are loaded when they are asked for.

    Raises:
        TrajectoryNotFoundError: the folder holds none.
        TrajectoryFormatError: a file of it is damaged or of a newer format version.
    """
    root = Path(path)
    require_trajectory(root)
    facts = read_facts(root)
    checkpoints = CheckpointFolder(root, facts)
    checkpoints.require_readable()
    steps = read_recorded_steps(root, facts, max(checkpoints))
    facts = facts_up_to(facts, len(steps))
    return Trajectory(
        facts=facts,
        steps=as_tensors(steps),
        checkpoints=CheckpointFolder(root, facts),
        curvature=TensorCache(root, layout.CURVATURE),
        unfinished=TensorCache(root, layout.UNFINISHED),
        features=TensorCache(root, layout.FEATURES),
        path=str(root),
        statistics=StatisticsFolder(root, max(checkpoints)),
        data_weights=read_data_weights(root, facts),
    )


def require_trajectory(root: Path) -> None:
    """Check that ``root`` holds a trajectory.

    Raises:
        TrajectoryNotFoundError: it does not.
    """
    if not (root / layout.FACTS_FILE).is_file():
        raise TrajectoryNotFoundError(
            f"No trajectory in {root}: expected a folder with {layout.FACTS_FILE}, as "
            f"TrajectoryRecorder writes it, got {_what_is(root)}. Check the path."
        )


def _what_is(root: Path) -> str:
    if not root.exists():
        return "nothing (it does not exist)"
    if is_ensemble(root):
        return "the folder of an ensemble (Ensemble.load), whose members are trajectories"
    return "a folder without one" if root.is_dir() else "a file"


def read_facts(root: Path) -> Facts:
    """The facts of the trajectory in ``root``.

    Raises:
        TrajectoryFormatError: they are damaged.
    """
    with reading(root / layout.FACTS_FILE, layout.TRAJECTORY) as file:
        facts = get_json(file, layout.FACTS)
        require_facts(facts)
        return Facts(
            parameters={
                name: ParameterFact(tuple(fact["shape"]), fact["dtype"], fact["group"])
                for name, fact in facts["parameters"].items()
            },
            optimizer=facts["optimizer"],
            num_examples=facts["num_examples"],
            fingerprint=facts["fingerprint"],
            settings=facts["settings"],
            stages=tuple(
                StageFact(
                    stage["start"],
                    tuple(stage["parameters"]),
                    bool(stage.get("new_optimizer", False)),
                )
                for stage in facts.get("stages", ())
            ),
            base=facts.get("base", {}),
        )


def read_data_weights(root: Path, facts: Facts) -> Tensor | None:
    """The weights of a what-if run's examples, float64 [train]; None of any other run.

    Raises:
        TrajectoryFormatError: they are damaged.
    """
    with reading(root / layout.FACTS_FILE, layout.TRAJECTORY) as file:
        if not has(file, layout.DATA_WEIGHTS):
            return None
        weights = get_array(file, layout.DATA_WEIGHTS, "float64")
        fits = weights.shape == (facts.num_examples,) and bool((weights >= 0).all())
        if not fits or not bool(np.isfinite(weights).all()):
            raise ValueError(
                f"{layout.DATA_WEIGHTS} must hold a number from 0 for each of "
                f"{facts.num_examples} training examples"
            )
        import torch

        return torch.from_numpy(weights)


@dataclass(frozen=True, eq=False)
class CheckpointFolder(Mapping[int, Checkpoint]):
    """The checkpoints of a trajectory by step, each read from its file when asked for."""

    root: Path
    facts: Facts

    def require_readable(self) -> None:
        """Open every file: a truncated one shows now and not hours into an attribution.

        Raises:
            TrajectoryFormatError: a file is missing, truncated or not a checkpoint.
        """
        self._require_initial()
        for step, path in self._files().items():
            with reading(path, layout.CHECKPOINT) as file:
                _require_step(file, step)

    def _require_initial(self) -> None:
        if 0 not in self._files():
            missing = layout.checkpoint_file(self.root, 0)
            raise TrajectoryFormatError(
                f"{missing} is missing: expected the checkpoint of the initial weights, got "
                f"checkpoints at steps {list(self._files())}. Restore the file, or record again."
            )

    def _files(self) -> dict[int, Path]:
        files = layout.checkpoint_files(self.root)
        if not files:
            require_trajectory(self.root)  # it may have been moved or deleted meanwhile
        return files

    def __getitem__(self, step: int) -> Checkpoint:
        from tda_lightning.runtime.random_states import require_restorable

        return self._read(step, get_tensors, require_restorable)

    def check(self, step: int) -> bool:
        """Read a checkpoint's file without torch, and say whether it holds the optimizer's state.

        Raises:
            TrajectoryFormatError: it is damaged.
        """
        found = self._read(step, get_arrays, require_forms)
        for deferred in (found.optimizer, found.random):
            if deferred is not None:
                len(deferred)
        return found.optimizer is not None

    def _read(
        self,
        step: int,
        get: Callable[[h5py.Group], dict[str, Any]],
        require_random: Callable[[dict[str, Any]], None],
    ) -> Checkpoint:
        """A checkpoint of what ``get`` makes of stored tensors; states are read when asked for."""
        files = self._files()
        path, unchanged = files[step], {}
        self._require_initial()
        if step:
            with reading(files[0], layout.CHECKPOINT) as file:
                unchanged = get(subgroup(file, layout.BUFFERS))
        with reading(path, layout.CHECKPOINT) as file:
            _require_step(file, step)
            stored = [subgroup(file, name) for name in (layout.BUFFERS, layout.PARAMETERS)]
            tensors = {**unchanged, **get(stored[0]), **get(stored[1])}
            # Sorted by the facts, which know the model's own order, while HDF5 lists names by the
            # alphabet; a parameter that is trained only later is stored with the buffers.
            parameters = {name: tensors.pop(name) for name in self.facts.parameters}
            _require_recorded(parameters, self.facts)
            optimizer = random = None
            if has(file, layout.OPTIMIZER):
                optimizer = Deferred(partial(_read_optimizer, path, get, tuple(parameters)))
            if has(file, layout.RANDOM):
                random = Deferred(partial(_read_random, path, get, require_random))
            return Checkpoint(step, parameters, tensors, optimizer, random)

    def __iter__(self) -> Iterator[int]:
        return iter(self._files())

    def __len__(self) -> int:
        return len(self._files())


def _read_optimizer(
    path: Path, get: Callable[[h5py.Group], dict[str, Any]], parameters: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    with reading(path, layout.CHECKPOINT) as file:
        group = subgroup(file, layout.OPTIMIZER)
        states = {layout.decode(n): get(subgroup(group, n)) for n in names(group)}
        return {name: states.get(name, {}) for name in parameters}


def _read_random(
    path: Path,
    get: Callable[[h5py.Group], dict[str, Any]],
    require: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    with reading(path, layout.CHECKPOINT) as file:
        states = get(subgroup(file, layout.RANDOM))
        require(states)
        return states


def _require_recorded(parameters: Mapping[str, Any], facts: Facts) -> None:
    for name, fact in facts.parameters.items():
        shape, dtype = parameters[name].shape, dtype_name(parameters[name])
        if tuple(shape) != fact.shape or dtype != fact.dtype:
            raise ValueError(f"parameter {name} is {dtype} {list(shape)}, expected {fact}")


def _require_step(file: h5py.File, step: int) -> None:
    if (stored := get_integer(file.attrs, layout.STEP)) != step:
        raise ValueError(f"the checkpoint of step {stored}, expected step {step}")


def read_recorded_steps(root: Path, facts: Facts, last_step: int) -> StepArrays:
    """Steps 1 to ``last_step``; what was written after the last checkpoint is not looked at.

    Raises:
        TrajectoryFormatError: steps are missing, or a file of them is damaged.
    """
    files = steps_chain(root, last_step)
    blocks = [read_steps(path, last - first + 1) for first, last, path in files]
    covered = files[-1][1] if files else 0
    if covered < last_step:
        raise TrajectoryFormatError(
            f"{root / layout.STEPS_FOLDER} is incomplete: expected the steps 1 to {last_step}, "
            f"got 1 to {covered}. Restore the missing files, or record again."
        )
    require_fitting(root / layout.STEPS_FOLDER, blocks, facts)
    if not blocks:
        groups = 1 + max((fact.group for fact in facts.parameters.values()), default=0)
        return no_steps(groups)
    return joined(blocks).between(0, last_step)


def steps_chain(root: Path, last_step: int) -> list[tuple[int, int, Path]]:
    """(first, last, file) of the steps files that together reach ``last_step``, or come closest.

    A file that others cover is not among them: a process was killed while it joined files.
    """
    chain, covered = [], 0
    for first, last, path in layout.steps_files(root):
        if last <= covered or covered >= last_step:
            continue
        if first != covered + 1:
            break
        chain.append((first, last, path))
        covered = last
    return chain
