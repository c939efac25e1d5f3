"""Data, module and task of a recorded run, built from its configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from tda_lightning.cli.command import not_null
from tda_lightning.cli.edited_data import build_data
from tda_lightning.cli.run_config import build
from tda_lightning.records.data_module import AttributedData
from tda_lightning.records.ensemble import Ensemble, folder_within
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.loading import ExampleSource, is_data_module
from tda_lightning.store.ensemble_file import is_ensemble, read_ensemble
from tda_lightning.tasks import AttributionTask, as_task


def load_parts(
    config: DictConfig, run_config: DictConfig
) -> tuple[AttributedData, LightningModule, AttributionTask | None]:
    """Data, module and task as recorded, with the changes that a command asks for."""
    data = build_data(run_config, config.trust_config, **not_null(config.data))
    # The weights are in the trajectory, and nothing is going to train.
    changes = {**config.get("model", {}), "optimizer": None, "scheduler": None}
    module = build(run_config.model, config.trust_config, **changes)
    if "task" in config:
        task = instantiate(config.task, _convert_="all")
    else:
        task = build(run_config.get("task"), config.trust_config)
    if "keep" not in config and (draws := config.get("draws")) is not None:
        if draws < 1:
            raise ValueError(f"draws must be at least 1 or null, got {draws}.")
        task = as_task(task)
        task.draws = draws
    return data, module, task


def load_recorded(folder: Path) -> Trajectory | Ensemble:
    """The run in a folder, or the ensemble."""
    return Ensemble.load(folder) if is_ensemble(folder) else Trajectory.load(str(folder))


def run_folder(folder: Path) -> Path:
    """The folder of a recorded run: of an ensemble's folder, that of the run it was made from."""
    if not is_ensemble(folder):
        return folder
    return folder_within(folder, read_ensemble(folder).run)


def replay_device(asked: str | None, trajectory: Trajectory) -> torch.device:
    """The device asked for, or else the one trained on: any other rounds differently."""
    if asked is not None:
        return torch.device(asked)
    on_cuda = str(trajectory.facts.settings.get("device", "cpu")).startswith("cuda")
    return torch.device("cuda" if on_cuda and torch.cuda.is_available() else "cpu")


def sources(data: AttributedData, batch_size: int) -> tuple[ExampleSource, ExampleSource]:
    """Training set and queries, made into batches as the data module's loaders make them, with its
    transfer hooks."""
    hooks = data if is_data_module(data) else None

    def source(dataset: Any, loader: object, what: str) -> ExampleSource:
        own = ExampleSource.of(loader, batch_size, what, hooks)
        size = own.batch_size if own.keys is not None else batch_size
        return replace(own, dataset=dataset, batch_size=size, num_workers=0, pin_memory=False)

    return (
        source(data.train_dataset, data.train_dataloader(), "training"),
        source(data.query_dataset, data.val_dataloader(), "query"),
    )
