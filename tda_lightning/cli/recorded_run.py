"""Data, module and task of a recorded run, built from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from tda_lightning.cli.added_data import Pool, pool_from
from tda_lightning.cli.command import not_null
from tda_lightning.cli.edited_data import as_trained
from tda_lightning.cli.own_data import OwnData, as_attributed
from tda_lightning.cli.own_module import build_module
from tda_lightning.cli.run_config import build, run_configuration, trusts
from tda_lightning.records.data_module import AttributedData
from tda_lightning.records.ensemble import Ensemble
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.loading import ExampleSource, is_data_module
from tda_lightning.store.ensemble_file import is_ensemble
from tda_lightning.tasks import AttributionTask, as_task


class Replayable(NamedTuple):
    """A recorded run that can be trained again: its module is on the device for that."""

    trajectory: Trajectory
    config: DictConfig  # as it was trained
    data: AttributedData
    module: LightningModule
    task: AttributionTask | None
    train: ExampleSource
    query: ExampleSource

    @staticmethod
    def load(config: DictConfig, folder: Path) -> Replayable:
        """The run in ``folder``, with the changes that a command asks for."""
        trajectory, run_config = Trajectory.load(str(folder)), run_configuration(config, folder)
        data, module, task = load_parts(config, run_config)
        module.to(replay_device(config.device, trajectory))
        train, query = sources(data, config.batch_size)
        return Replayable(trajectory, run_config, data, module, task, train, query)


def load_parts(
    config: DictConfig, run_config: DictConfig
) -> tuple[AttributedData, LightningModule, AttributionTask | None]:
    """Data, module and task as recorded, with the changes that a command asks for."""
    data = load_data(config, run_config)
    # The weights are in the trajectory, and nothing is going to train.
    module = build_module(run_config, trusts(config), config.get("model", {}), trained=False)
    if "task" in config:
        task = instantiate(config.task, _convert_="all")
    else:
        task = build(run_config.get("task"), trusts(config))
    if "keep" not in config and (draws := config.get("draws")) is not None:
        if draws < 1:
            raise ValueError(f"draws must be at least 1 or null, got {draws}.")
        task = as_task(task)
        task.draws = draws
    return data, module, task


def pool_of(config: DictConfig, run_config: DictConfig, asked: Mapping[str, Any]) -> Pool:
    """The pool that ``pool={KEY: VALUE}`` names: the recorded data with other settings, whatever
    training left out of them or added.

    Args:
        asked: these settings; ``split`` is that of the data.

    Raises:
        ValueError: an unknown part of the data.
    """
    settings = {str(key): value for key, value in asked.items()}
    return pool_from(run_config, not_null(config.data), settings, trusts(config))


def load_data(
    config: DictConfig, run_config: DictConfig, changes: Mapping[str, Any] | None = None
) -> AttributedData:
    """The data as recorded, with the changes that a command asks for.

    Args:
        changes: further ones, which come first.
    """
    asked = {**(changes or {}), **not_null(config.data)}
    kind = str(run_config.data.get("_target_"))
    if kind.startswith("tda_lightning.examples.data."):
        data: AttributedData = as_trained(
            run_config, build(run_config.data, trusts(config), **asked), trusts(config), asked
        )
        return data
    # Which queries there are is not for a plain data module to know.
    chosen = {name: asked.pop(name) for name in ("queries", "num_query") if name in asked}
    trust = trusts(config)
    own = as_trained(run_config, build(run_config.data, trust, **asked), trust, asked)
    if chosen and not isinstance(as_attributed(own), OwnData):
        own = build(run_config.data, trust, **asked, **chosen)
        return as_attributed(as_trained(run_config, own, trust, asked))
    return as_attributed(own, **chosen)


def load_recorded(folder: Path) -> Trajectory | Ensemble:
    """The run in a folder, or the ensemble."""
    return Ensemble.load(folder) if is_ensemble(folder) else Trajectory.load(str(folder))


def replay_device(asked: str | None, trajectory: Trajectory) -> torch.device:
    """The device asked for, or else the one trained on: any other rounds differently."""
    if asked is not None:
        return torch.device(asked)
    on_cuda = str(trajectory.facts.settings.get("device", "cpu")).startswith("cuda")
    return torch.device("cuda" if on_cuda and torch.cuda.is_available() else "cpu")


def sources(data: AttributedData, batch_size: int) -> tuple[ExampleSource, ExampleSource]:
    """Training set and queries, made into batches as the data module's loaders make them, with its
    transfer hooks."""
    own = data.own if isinstance(data, OwnData) else data
    hooks = own if is_data_module(own) else None

    def source(dataset: Any, loader: object, what: str) -> ExampleSource:
        own = ExampleSource.of(loader, batch_size, what, hooks)
        size = own.batch_size if own.keys is not None else batch_size
        return replace(own, dataset=dataset, batch_size=size, num_workers=0, pin_memory=False)

    return (
        source(data.train_dataset, data.train_dataloader(), "training"),
        source(data.query_dataset, data.val_dataloader(), "query"),
    )
