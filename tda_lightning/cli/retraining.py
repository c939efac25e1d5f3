"""Ground truth for ``tda evaluate``: taken up from its file, the rest retrained and kept."""

from __future__ import annotations

import copy
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from tda_lightning.cli.recorded import build, command_line
from tda_lightning.data import DataModule
from tda_lightning.errors import TrajectoryLockedError, UnsupportedTrainingError
from tda_lightning.evaluation import (
    FreshTraining,
    GroundTruth,
    draw_seeds,
    draw_subsets,
    landing_error,
    measure,
    retrain,
    retrain_afresh,
    retrain_each,
    what_determines,
)
from tda_lightning.evaluation.ground_truth import PROTOCOLS, RECORDED_SEED
from tda_lightning.progress import SlowProgress
from tda_lightning.store.ground_truth import read_ground_truth, write_ground_truth
from tda_lightning.store.lock import FolderLock
from tda_lightning.trajectory import Trajectory

_TRAINERS = ("lightning.pytorch.Trainer", "lightning.Trainer")
_INTERRUPTED = 130  # exit status, as of a command that SIGINT ends
# Where the data lie, in which order they come and who is asked do not belong to the algorithm.
_NOT_OF_THE_ALGORITHM = ("root", "seed", "num_query", "num_workers")


@dataclass(frozen=True)
class Parts:
    """A recorded run with everything that retraining it takes."""

    trajectory: Trajectory
    data: Any
    module: LightningModule
    task: Any
    recorded: DictConfig
    config: DictConfig

    def outcomes(self, kept: Tensor, seeds: Sequence[int]) -> Iterator[tuple[Tensor, float]]:
        """Measurements [query] after retraining on each row of ``kept``, and seconds it took."""
        began, queries = time.monotonic(), self.data.query_dataset
        for state in self._states(kept, seeds):
            found = measure(self.module, self.task, state, queries, self.config.batch_size)
            yield found, time.monotonic() - began
            began = time.monotonic()

    def _states(self, kept: Tensor, seeds: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        if self.config.protocol == "single_run":
            work = (self.trajectory, self.module, self.task, self.data.train_dataset)
            yield from retrain_each(*work, kept.float(), together=self.config.together)
            return
        for row, seed in zip(kept, seeds, strict=True):
            yield retrain_afresh(self._fresh, row, seed)

    def _fresh(self, seed: int) -> FreshTraining:
        """As ``tda train`` makes them, by the recorded configuration."""
        recorded, trust = self.recorded, self.config.trust_config
        data = self._data(seed)
        data.setup()
        seed_everything(seed, workers=True, verbose=False)
        module = build(recorded.model, trust)
        return FreshTraining(_trainer(recorded.get("trainer"), trust), module, data)

    def _data(self, seed: int) -> Any:
        """The data in the order of ``seed``."""
        if isinstance(self.data, DataModule):
            # Ours differ by their seed in the order alone, so what was read serves all of them.
            data = copy.copy(self.data)
            data.seed = seed
            return data
        recorded = self.recorded.data
        changes = {key: value for key, value in self.config.data.items() if value is not None}
        if "seed" in recorded:
            changes["seed"] = seed
        return build(recorded, self.config.trust_config, **changes)

    def training(self) -> dict[str, Any] | None:
        """The settings of training afresh; None for a replay."""
        if self.config.protocol == "single_run":
            return None
        found = OmegaConf.to_container(self.recorded, resolve=True)
        assert isinstance(found, dict)
        data = {k: v for k, v in found["data"].items() if k not in _NOT_OF_THE_ALGORITHM}
        return {"data": data, "model": found["model"], "trainer": found.get("trainer")}


def _trainer(node: Any, trust: bool) -> Trainer:
    """A new Trainer of the recorded settings, that writes and shows nothing."""
    settings = dict(OmegaConf.to_container(node, resolve=True) if node else {})  # type: ignore[arg-type]
    target = settings.pop("_target_", _TRAINERS[0])
    if target not in _TRAINERS and not trust:
        raise ValueError(
            f"The recorded configuration trains with {target}; expected {_TRAINERS[0]}. Building "
            "it runs its code: if you know where the trajectory comes from, add trust_config=true."
        )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if target not in _TRAINERS:
        made: Trainer = build({"_target_": target, **settings, **quiet}, trust)
        return made
    return Trainer(**{**build(settings, trust), **quiet})


def ground_truth(parts: Parts, path: Path) -> GroundTruth:
    """What is asked for: from the file as far as it goes, the rest retrained and kept there."""
    config, num_train = parts.config, len(parts.data.train_dataset)
    _check(config, parts.trajectory)
    last = parts.trajectory.checkpoints[parts.trajectory.last_step]
    end = {**last.buffers, **last.parameters}
    baseline = measure(parts.module, parts.task, end, parts.data.query_dataset, config.batch_size)
    determined = what_determines(
        parts.trajectory, parts.module, parts.task, parts.data.query_dataset, parts.training()
    )

    def taken_up() -> GroundTruth:
        found = read_ground_truth(path) if path.exists() else None
        rows, columns = config.num_subsets, config.seeds
        if found is not None:
            rows = max(rows, found.seeds.shape[0])
            columns = max(columns, found.seeds.shape[1])
        asked = GroundTruth.asked(
            config.protocol,
            _subsets(config, num_train, rows),
            _seeds(config.protocol, rows, columns, config.seed),
            baseline,
            determined,
            {"command": command_line()},
        )
        return asked if found is None else asked.taking(found)

    truth = taken_up()
    if truth.first(config.num_subsets, config.seeds).missing:
        with _alone(path):
            truth = _retrained(parts, taken_up(), path)
    return truth.first(config.num_subsets, config.seeds)


def _retrained(parts: Parts, truth: GroundTruth, path: Path) -> GroundTruth:
    """Make what is missing, each retraining kept in the file as soon as it is done."""
    config = parts.config
    missing = truth.first(config.num_subsets, config.seeds).missing
    if config.protocol == "single_run" and len(missing) == truth.done.numel():
        work = (parts.trajectory, parts.module, parts.task, parts.data.train_dataset)
        error = landing_error(parts.trajectory, retrain(*work, torch.ones(truth.subsets.shape[1])))
        truth = truth.noting(landing_error=error)
    done = 0
    try:
        with SlowProgress("Retraining", len(missing)) as progress:
            for (row, column), outcome, seconds in _outcomes(parts, truth, missing):
                truth = truth.known(row, column, outcome, seconds)
                write_ground_truth(truth, path)
                done += 1
                progress.advance()
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning leaves without a word.
        print(
            f"Interrupted after {done} of {len(missing)} retrainings, which are kept in {path}. "
            "The same command goes on from there.",
            file=sys.stderr,
        )
        raise SystemExit(_INTERRUPTED) from stop
    return truth


def _outcomes(
    parts: Parts, truth: GroundTruth, missing: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Tensor, float]]:
    kept = truth.subsets[[row for row, _ in missing]]
    seeds = [int(truth.seeds[pair]) for pair in missing]
    if parts.config.processes == 1:
        for pair, (outcome, seconds) in zip(missing, parts.outcomes(kept, seeds), strict=True):
            yield pair, outcome, seconds
        return
    settings: Any = OmegaConf.to_container(parts.config, resolve=True)
    size = parts.config.together if parts.config.protocol == "single_run" else 1
    pool = ProcessPoolExecutor(
        min(parts.config.processes, len(missing)),
        # A fork of a process that used CUDA cannot use it.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(settings,),
    )
    try:
        waiting = {}
        for first in range(0, len(missing), size):
            part = slice(first, first + size)
            waiting[pool.submit(_work, kept[part].numpy(), seeds[part])] = missing[part]
        for future in as_completed(waiting):
            for pair, (found, seconds) in zip(waiting[future], future.result(), strict=True):
                yield pair, torch.from_numpy(found), seconds
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_own: list[Parts] = []  # of a process that retrains for another one


def _begin(settings: Any) -> None:
    from tda_lightning.cli.commands import parts_to_retrain, quiet_lightning

    quiet_lightning()
    # Of an interruption the first process tells; the others end without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    config = OmegaConf.create(settings)
    torch.set_num_threads(config.threads or 1)
    _own.append(parts_to_retrain(config))


def _work(kept: np.ndarray, seeds: Sequence[int]) -> list[tuple[np.ndarray, float]]:
    found = _own[0].outcomes(torch.from_numpy(kept), seeds)
    return [(outcome.double().cpu().numpy(), seconds) for outcome, seconds in found]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """The only process that adds to this ground truth."""
    folder = path.parent / f"{path.name}.lock"
    lock = FolderLock(folder)
    try:
        lock.acquire()
    except TrajectoryLockedError as error:
        raise TrajectoryLockedError(
            f"Another process is adding to {path}. Wait until it has ended, and give several files "
            "of scores to one command: scores=[A,B]."
        ) from error
    try:
        for file in path.parent.iterdir():
            # What a killed process had begun to write.
            if file.name.startswith(f"{path.name}.") and file.name.endswith(".part"):
                file.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
        with suppress(OSError):
            folder.rmdir()


def file_name(config: DictConfig) -> str:
    """Of a ground truth, without its ending: one file for each way to draw subsets."""
    drawn = f"{config.alpha:g}" if config.leave_out is None else f"leave_out-{config.leave_out}"
    return f"{config.protocol}-{drawn}-{config.seed}"


def _subsets(config: DictConfig, num_train: int, count: int) -> Tensor:
    """The first ``count`` subsets, bool [subset, train]: more of them begin with the same ones."""
    left_out = config.leave_out
    if left_out is None:
        return draw_subsets(num_train, config.alpha, count, config.seed)
    if not 1 <= left_out < num_train:
        raise ValueError(f"leave_out must be from 1 to {num_train - 1}, got {left_out}.")
    if left_out > 1:
        return draw_subsets(num_train, (num_train - left_out) / num_train, count, config.seed)
    if count > num_train:
        raise ValueError(
            f"There are {num_train} training examples to leave out one by one, got "
            f"num_subsets={count}."
        )
    # Each of them at most once.
    order = torch.randperm(num_train, generator=torch.Generator().manual_seed(config.seed))
    kept = torch.ones(count, num_train, dtype=torch.bool)
    kept[torch.arange(count), order[:count]] = False
    return kept


def _seeds(protocol: str, rows: int, columns: int, seed: int) -> Tensor:
    if protocol == "algorithm":
        return draw_seeds(rows, columns, seed)
    return torch.full((rows, columns), RECORDED_SEED, dtype=torch.int64)


def _check(config: DictConfig, trajectory: Trajectory) -> None:
    """Refuse settings that no retraining can answer, before any begins."""
    if config.protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be {' or '.join(PROTOCOLS)}, got {config.protocol}.")
    if config.num_subsets < 3:
        raise ValueError(
            f"A rank correlation needs at least 3 subsets, got num_subsets={config.num_subsets}."
        )
    for name in ("seeds", "processes", "together"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}.")
    if config.protocol == "single_run" and config.seeds != 1:
        raise ValueError(
            f"protocol=single_run repeats the recorded seed: expected seeds=1, got {config.seeds}. "
            "Several seeds for each subset are for protocol=algorithm."
        )
    if config.protocol == "algorithm" and trajectory.facts.settings.get("world_size", 1) != 1:
        raise UnsupportedTrainingError(
            "The run was trained in several processes, which training anew does not start. Judge "
            "by protocol=single_run."
        )
