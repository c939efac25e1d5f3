"""The ground truth that ``tda evaluate`` judges scores by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from tda_lightning.cli.kept import kept_retrainings
from tda_lightning.cli.recorded import command_line
from tda_lightning.cli.retraining import Parts
from tda_lightning.evaluation import GroundTruth, draw_seeds, draw_subsets, what_determines
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.ground_truth import RECORDED_SEED
from tda_lightning.records.trajectory import Trajectory


def ground_truth(parts: Parts, path: Path) -> GroundTruth:
    """What is asked for: from the file as far as it goes, the rest retrained and kept there."""
    config, num_train = parts.config, len(parts.data.train_dataset)
    _check(config, parts.trajectory)
    baseline, determined = parts.recorded_measurements(), determined_by(parts)

    def ask(found: Sequence[GroundTruth]) -> GroundTruth:
        rows = max(config.num_subsets, *(len(one.seeds) for one in found), 0)
        columns = max(config.seeds, *(one.seeds.shape[1] for one in found), 0)
        asked = GroundTruth.asked(
            config.protocol,
            _subsets(config, num_train, rows),
            seeds_of(config.protocol, rows, columns, config.seed),
            baseline,
            determined,
            {"command": command_line()},
        )
        for one in found:
            asked = asked.taking(one)
        return asked

    return kept_retrainings(parts, path, ask, config.num_subsets)


def determined_by(parts: Parts) -> dict[str, object]:
    """All that decides what a retraining gives, besides the subset and the seed."""
    return what_determines(
        parts.trajectory, parts.module, parts.task, parts.data.query_dataset, parts.training()
    )


def file_name(config: DictConfig) -> str:
    """Of a ground truth, without its ending: one file for each way to draw subsets."""
    if config.protocol == "pbrf":
        return f"pbrf-{config.damping:g}-{config.seed}"
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


def seeds_of(protocol: str, rows: int, columns: int, seed: int) -> Tensor:
    """Of each retraining, int64 [subset, seed]."""
    if protocol == "algorithm":
        return draw_seeds(rows, columns, seed)
    return torch.full((rows, columns), RECORDED_SEED, dtype=torch.int64)


def _check(config: DictConfig, trajectory: Trajectory) -> None:
    """Refuse settings that no retraining can answer, before any begins."""
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
            f"{config.seeds}. Several seeds for each subset are for protocol=algorithm."
        )
    if config.protocol == "algorithm" and trajectory.facts.settings.get("world_size", 1) != 1:
        raise UnsupportedTrainingError(
            "The run was trained in several processes, which training anew does not start. Judge "
            "by protocol=single_run."
        )
