"""Data, module and task of a recorded run, built from its configuration."""

from __future__ import annotations

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from tda_lightning.cli.command import not_null
from tda_lightning.cli.run_config import build
from tda_lightning.records.data_module import AttributedData
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.tasks import AttributionTask


def load_parts(
    config: DictConfig, run_config: DictConfig
) -> tuple[AttributedData, LightningModule, AttributionTask | None]:
    """Data, module and task as recorded, with the changes that a command asks for."""
    data = build(run_config.data, config.trust_config, **not_null(config.data))
    # The weights are in the trajectory, and nothing is going to train.
    changes = {**config.get("model", {}), "optimizer": None, "scheduler": None}
    module = build(run_config.model, config.trust_config, **changes)
    if "task" in config:
        return data, module, instantiate(config.task, _convert_="all")
    return data, module, build(run_config.get("task"), config.trust_config)


def replay_device(asked: str | None, trajectory: Trajectory) -> torch.device:
    """The device asked for, or else the one trained on: any other rounds differently."""
    if asked is not None:
        return torch.device(asked)
    on_cuda = str(trajectory.facts.settings.get("device", "cpu")).startswith("cuda")
    return torch.device("cuda" if on_cuda and torch.cuda.is_available() else "cpu")
