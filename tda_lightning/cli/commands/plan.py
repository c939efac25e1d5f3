"""``tda plan``, for an attribution or for a recording."""

from __future__ import annotations

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from tda_lightning.attribution.asked_checkpoint import asked_about
from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.added_data import apply_extra
from tda_lightning.cli.command import (
    clear_errors,
    estimator_name,
    require_usable_solver,
    required,
)
from tda_lightning.cli.commands.train import adopt_configuration, output_folder
from tda_lightning.cli.edited_data import apply_drop
from tda_lightning.cli.own_module import build_module
from tda_lightning.cli.plan_tables import (
    attribution_plan_table,
    comparison_table,
    index_plan_table,
    recording_plan_table,
)
from tda_lightning.cli.question import measurement_of
from tda_lightning.cli.recorded_run import load_parts, load_recorded, sources
from tda_lightning.cli.run_config import run_configuration, run_folder
from tda_lightning.cli.trainers import configured_trainer
from tda_lightning.index.plan import plan_index as planned_index
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.plans import AttributionPlan


@clear_errors
def plan(config: DictConfig) -> None:
    """Show how long attributions of a trajectory will take on this machine, and how large they
    will be."""
    folder = Path(required(config, "trajectory", "tda plan trajectory=FOLDER"))
    trajectory = asked_about(load_recorded(folder), config.at_step, config.ckpt)
    data, module, task = load_parts(config, run_configuration(config, run_folder(folder)))
    trainer = configured_trainer(config.trainer)
    single = "estimator" in config
    if single:
        require_usable_solver(config)
    nodes = {estimator_name(): config.estimator} if single else config.estimators
    train, query = sources(data, config.batch_size)
    plans: dict[str, AttributionPlan | str] = {}
    for name, node in nodes.items():
        attribution = AttributionModule(
            module, trajectory, instantiate(node, _convert_="all"), task
        )
        try:
            plans[str(name)] = attribution.plan(
                train=train,
                query=query,
                batch_size=config.batch_size,
                trainer=trainer,
                self_influence=config.self_influence,
                draws=config.draws,
                keep=config.keep,
                measurement=measurement_of(config.get("measurement"), data),
            )
        except (UnsupportedTrainingError, ValueError) as error:
            if single:
                raise
            plans[str(name)] = str(error)
    Console().print(
        *(attribution_plan_table(one) for one in plans.values() if isinstance(one, AttributionPlan))
        if single
        else [comparison_table(plans)]
    )


@clear_errors
def plan_recording(config: DictConfig) -> None:
    """Show how much disk space and memory recording a training run will take."""
    adopt_configuration(config)
    config.output = str(output_folder(config))
    data = instantiate(config.data, _convert_="all")
    data, _ = apply_extra(config, apply_drop(config, data))
    module = build_module(config, trust=True)
    recorder = instantiate(config.recorder, _convert_="all")
    plan = recorder.plan(module, configured_trainer(config.trainer, [recorder]), data)
    Console().print(recording_plan_table(plan))


@clear_errors
def plan_index(config: DictConfig) -> None:
    """Show how large an index of a run will be, and how long it takes to build and to search."""
    folder = Path(required(config, "trajectory", "tda plan index FOLDER"))
    run = load_recorded(folder)
    data, module, task = load_parts(config, run_configuration(config, run_folder(folder)))
    train, _ = sources(data, config.batch_size)
    rate = config.read_gb_per_second
    found = planned_index(
        AttributionModule(module, run, instantiate(config.estimator, _convert_="all"), task),
        train,
        folder,
        bytes_per_example=config.bytes_per_example,
        dtype=config.dtype,
        batch_size=config.batch_size,
        examples=config.num_examples,
        read_bytes_per_second=None if rate is None else rate * 1e9,
        machines=config.machines,
        price_per_hour=config.price_per_hour,
        trainer=configured_trainer(config.trainer),
    )
    Console().print(index_plan_table(found))
