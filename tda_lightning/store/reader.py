"""Reads a trajectory from its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
from torch import Tensor

from tda_lightning.records.errors import TrajectoryFormatError, TrajectoryNotFoundError
from tda_lightning.records.trajectory import (
    Checkpoint,
    Facts,
    ParameterFact,
    StageFact,
    Steps,
    Trajectory,
)
from tda_lightning.runtime.random_states import require_restorable
from tda_lightning.store import layout
from tda_lightning.store.hdf5 import get_json, get_tensors, reading, subgroup
from tda_lightning.store.record_checks import require_facts, require_fitting
from tda_lightning.store.statistics_folder import StatisticsFolder
from tda_lightning.store.steps_file import join_steps, no_steps, read_steps
from tda_lightning.store.tensor_cache import TensorCache
from tda_lightning.store.untrusted import get_integer, has, names


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
        steps=steps,
        checkpoints=CheckpointFolder(root, facts),
        curvature=TensorCache(root, layout.CURVATURE),
        unfinished=TensorCache(root, layout.UNFINISHED),
        features=TensorCache(root, layout.FEATURES),
        path=str(root),
        statistics=StatisticsFolder(root, max(checkpoints)),
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
    return "a folder without one" if root.is_dir() else "a file"


def read_facts(root: Path) -> Facts:
    with reading(root / layout.FACTS_FILE, layout.TRAJECTORY) as file:
        text = get_json(file, layout.FACTS)
        require_facts(text)
        return Facts(
            parameters={
                str(name): ParameterFact(
                    tuple(int(length) for length in fact["shape"]),
                    str(fact["dtype"]),
                    int(fact["group"]),
                )
                for name, fact in text["parameters"].items()
            },
            optimizer=str(text["optimizer"]),
            num_examples=None if text["num_examples"] is None else int(text["num_examples"]),
            fingerprint=None if text["fingerprint"] is None else _texts(text["fingerprint"]),
            settings=dict(text["settings"]),
            stages=read_stages(text.get("stages", ()), list(text["parameters"])),
        )


def read_stages(entries: Sequence[Any], parameters: Sequence[str]) -> tuple[StageFact, ...]:
    """Stages as the facts' JSON has them."""
    stages = tuple(
        StageFact(
            int(entry["start"]),
            tuple(str(name) for name in entry["parameters"]),
            bool(entry.get("new_optimizer", False)),
        )
        for entry in entries
    )
    starts = [stage.start for stage in stages]
    known = all(name in parameters for stage in stages for name in stage.parameters)
    rising = all(a < b for a, b in zip(starts, starts[1:], strict=False))
    if stages and (starts[0] != 0 or not rising or not known):
        raise ValueError(f"stages that start at {starts}")
    return stages


def facts_up_to(facts: Facts, num_steps: int) -> Facts:
    """The facts without stages of no recorded step, and what only those would train.

    A stage is announced at its start, and the run may have been killed right after.
    """
    kept = tuple(stage for stage in facts.stages if stage.start < max(num_steps, 1))
    if kept == facts.stages:
        return facts
    trained = {name for stage in kept for name in stage.parameters}
    parameters = {name: fact for name, fact in facts.parameters.items() if name in trained}
    return replace(facts, parameters=parameters, stages=kept)


def _texts(mapping: Mapping[Any, Any]) -> dict[str, str]:
    texts = {str(key): str(value) for key, value in mapping.items()}
    if not all(key == "length" or key.isdecimal() for key in texts) or "length" not in texts:
        raise ValueError(f"a fingerprint with keys {list(texts)[:5]}")
    return texts


_States = Mapping[str, Mapping[str, Tensor]]


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
        return layout.checkpoint_files(self.root)

    def __getitem__(self, step: int) -> Checkpoint:
        files = self._files()
        if step not in files:
            raise KeyError(step)
        self._require_initial()  # it holds the buffers that never changed
        with reading(files[step], layout.CHECKPOINT) as file:
            _require_step(file, step)
            tensors = {
                **get_tensors(subgroup(file, layout.BUFFERS)),
                **get_tensors(subgroup(file, layout.PARAMETERS)),
            }
            optimizer = None
            if has(file, layout.OPTIMIZER):
                states = subgroup(file, layout.OPTIMIZER)
                optimizer = {
                    layout.decode(name): get_tensors(subgroup(states, name))
                    for name in names(states)
                }
            random = None
            if has(file, layout.RANDOM):
                random = get_tensors(subgroup(file, layout.RANDOM))
                require_restorable(random)
            if step == 0:
                return self._checkpoint(step, tensors, optimizer, random)
        with reading(files[0], layout.CHECKPOINT) as file:
            tensors = {**get_tensors(subgroup(file, layout.BUFFERS)), **tensors}
            return self._checkpoint(step, tensors, optimizer, random)

    def _checkpoint(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        optimizer: _States | None,
        random: Mapping[str, Tensor] | None,
    ) -> Checkpoint:
        """Sorted by the facts: a parameter that is trained only later lies with the buffers."""
        self._require_recorded(tensors)
        names = self.facts.parameters
        return Checkpoint(
            step=step,
            # HDF5 lists names by the alphabet; the facts know the model's own order.
            parameters={name: tensors[name] for name in names},
            buffers={name: tensor for name, tensor in tensors.items() if name not in names},
            optimizer=None if optimizer is None else {n: optimizer.get(n, {}) for n in names},
            random=random,
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self._files())

    def __len__(self) -> int:
        return len(self._files())

    def _require_recorded(self, parameters: Mapping[str, Tensor]) -> None:
        for name, fact in self.facts.parameters.items():
            shape, dtype = parameters[name].shape, parameters[name].dtype
            if tuple(shape) != fact.shape or str(dtype).removeprefix("torch.") != fact.dtype:
                raise ValueError(f"parameter {name} is {dtype} {list(shape)}, expected {fact}")


def _require_step(file: h5py.File, step: int) -> None:
    if (found := get_integer(file.attrs, layout.STEP)) != step:
        raise ValueError(f"the checkpoint of step {found}, expected step {step}")


def read_recorded_steps(root: Path, facts: Facts, last_step: int) -> Steps:
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
    return join_steps(blocks).between(0, last_step)


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
