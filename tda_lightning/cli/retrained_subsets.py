"""The ground truth that ``tda evaluate`` judges scores by: the run retrained on subsets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from tda_lightning.cli.command import command_line
from tda_lightning.cli.retraining import RecordedRun
from tda_lightning.cli.retraining_cache import cached_retrainings
from tda_lightning.evaluation import (
    GroundTruth,
    draw_seeds,
    draw_subsets,
    truth_configuration,
)
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.ground_truth import RECORDED_SEED
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.digests import digest


def retrained_subsets(run: RecordedRun, path: Path) -> GroundTruth:
    """The configured number of subsets and seeds, cached in the file at ``path``.

    Raises:
        ValueError, UnsupportedTrainingError: settings that no retraining can answer.
    """
    config, num_train = run.config, len(run.data.train_dataset)
    _check(config, run.trajectory)
    baseline, configuration = run.recorded_measurements(), configuration_of(run)

    def request(cached: Sequence[GroundTruth]) -> GroundTruth:
        # A file may hold more than is asked for now, and keeps it.
        rows = max(config.num_subsets, *(len(truth.seeds) for truth in cached), 0)
        columns = max(config.seeds, *(truth.seeds.shape[1] for truth in cached), 0)
        requested = GroundTruth.unmeasured(
            config.protocol,
            _subsets(config, num_train, rows),
            seeds_of(config.protocol, rows, columns, config.seed),
            baseline,
            configuration,
            {"command": command_line()},
        )
        for truth in cached:
            requested = requested.continuing(truth)
        return requested

    return cached_retrainings(run, path, request, config.num_subsets)


def configuration_of(run: RecordedRun) -> dict[str, object]:
    """What decides the outcome of a retraining, besides the subset and the seed."""
    return truth_configuration(
        run.trajectory, run.module, run.task, run.queries, run.training_settings()
    )


def truth_name(config: DictConfig) -> str:
    """Name of the file without its suffix; each way to draw subsets has a file of its own."""
    if config.protocol == "pbrf":
        return f"pbrf-{config.damping:g}-{config.seed}"
    asked = OmegaConf.to_container(config.measurement) if config.get("measurement") else None
    suffix = "" if asked is None else f"-{digest(json.dumps(asked, sort_keys=True))[:8]}"
    drawn = f"{config.alpha:g}" if config.leave_out is None else f"leave_out-{config.leave_out}"
    return f"{config.protocol}-{drawn}-{config.seed}{suffix}"


def _subsets(config: DictConfig, num_train: int, count: int) -> Tensor:
    """``count`` subsets, bool [subset, train]; a larger number starts with the same ones."""
    left_out = config.leave_out
    if left_out is None:
        if not 0 < (size := round(config.alpha * num_train)) < num_train:
            raise ValueError(
                f"alpha={config.alpha:g} keeps {size} of {num_train} training examples, expected "
                "a share that keeps some and leaves some out, such as alpha=0.5. Where none is "
                "given, it is the keep of the scores."
            )
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
    # Each example is left out at most once.
    order = torch.randperm(num_train, generator=torch.Generator().manual_seed(config.seed))
    kept = torch.ones(count, num_train, dtype=torch.bool)
    kept[torch.arange(count), order[:count]] = False
    return kept


def seeds_of(protocol: str, rows: int, columns: int, seed: int) -> Tensor:
    """The seed of each retraining, int64 [subset, seed]."""
    if protocol == "algorithm":
        return draw_seeds(rows, columns, seed)
    return torch.full((rows, columns), RECORDED_SEED, dtype=torch.int64)


def _check(config: DictConfig, trajectory: Trajectory) -> None:
    if config.num_subsets < 3:
        raise ValueError(
            f"A rank correlation needs at least 3 subsets, got num_subsets={config.num_subsets}."
        )
    for name in ("seeds", "processes", "together"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}.")
    if config.protocol != "algorithm" and config.seeds != 1:
        raise ValueError(
            f"protocol={config.protocol} repeats the recorded seed: expected seeds=1, got "
            f"{config.seeds}. Several seeds per subset are for protocol=algorithm."
        )
    if config.protocol == "algorithm" and trajectory.facts.settings.get("world_size", 1) != 1:
        raise UnsupportedTrainingError(
            "The run was trained in several processes, and retraining from scratch uses one. Judge "
            "by protocol=single_run."
        )
