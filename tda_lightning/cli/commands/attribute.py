"""``tda attribute``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf

from tda_lightning.attribution.asked_checkpoint import asked_about
from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.command import (
    clear_errors,
    command_line,
    estimator_name,
    require_new,
    require_usable_solver,
    required,
)
from tda_lightning.cli.question import measurement_of
from tda_lightning.cli.recorded_run import (
    load_parts,
    load_recorded,
    pool_of,
    sources,
)
from tda_lightning.cli.run_config import run_configuration, run_folder
from tda_lightning.cli.trainers import configured_trainer
from tda_lightning.edits import Relabel, Removal, load_edits, pool_notes
from tda_lightning.records.data_module import AttributedData, Describing
from tda_lightning.records.ensemble import Ensemble
from tda_lightning.records.trajectory import Trajectory


@clear_errors
def attribute(config: DictConfig) -> None:
    """Score the recorded training examples for the recorded queries."""
    folder = Path(required(config, "trajectory", "tda attribute trajectory=FOLDER"))
    target = Path(config.scores or folder / "scores" / f"{estimator_name()}.h5")
    require_usable_solver(config)
    trajectory = asked_about(load_recorded(folder), config.at_step, config.ckpt)
    run_config = run_configuration(config, run_folder(folder))
    require_new(
        config, "scores, which are kept", "scores=FILE", target
    )  # before anything is loaded
    data, module, task = load_parts(config, run_config)
    attribution = AttributionModule(
        module,
        trajectory=trajectory,
        estimator=instantiate(config.estimator, _convert_="all"),
        task=task,
    )
    provenance: dict[str, object] = {
        "command": command_line(),
        "config": OmegaConf.to_container(config, resolve=True),
    }
    recorded = trajectory
    if isinstance(recorded, Ensemble):
        recorded = Trajectory.load(run_folder(folder))
        recorded = recorded if config.at_step is None else recorded.until(config.at_step)
    if predictions := _predictions(module, data, recorded):
        provenance["predictions"] = predictions
    edits = _edits(config, len(data.train_dataset))
    train, query = sources(data, config.batch_size)
    try:
        scores = attribution.attribute(
            train=train,
            query=query,
            batch_size=config.batch_size,
            trainer=configured_trainer(config.trainer),
            scores_path=str(target),
            self_influence=config.self_influence,
            overwrite=config.overwrite,
            provenance=provenance,
            edits=edits,
            draws=config.draws,
            keep=config.keep,
            measurement=measurement_of(config.get("measurement"), data),
            by_token=config.by_token,
            pool=None if config.pool is None else pool_of(config, run_config, config.pool).dataset,
        )
    except (KeyboardInterrupt, SystemExit):
        # Lightning exits without a message.
        runs = trajectory if isinstance(trajectory, Ensemble) else [trajectory]
        unfinished = any(run.unfinished for run in runs)
        resume = " Run the same command again to resume." if unfinished else ""
        print(f"Interrupted: {target} was not written.{resume}", file=sys.stderr)
        raise
    what = "edits" if config.edits else "other labels" if config.relabel else "training examples"
    if config.pool is not None:
        what = "examples of the pool"
        for note in pool_notes(scores.provenance["pool"]):
            print(note)
    print(f"Scored {scores.num_train} {what} for {scores.num_queries} queries: {target}")


def _edits(config: DictConfig, num_train: int) -> Sequence[Removal | Relabel] | None:
    """The edits that ``edits=FILE`` or ``relabel={INDEX: LABEL}`` asks for."""
    if config.edits is None:
        return _relabels(config.relabel)
    if config.relabel is not None:
        raise ValueError("Give edits=FILE or relabel={INDEX: LABEL}, not both.")
    return load_edits(config.edits, num_train)


def _relabels(labels: DictConfig | None) -> list[Relabel] | None:
    """The edits that ``relabel={INDEX: LABEL}`` asks for."""
    if labels is None:
        return None
    plain: object = OmegaConf.to_container(labels)
    if not isinstance(plain, dict) or not all(isinstance(index, int) for index in plain):
        raise ValueError(
            "relabel names training examples by index, as relabel={3: 7} for label 7 of example "
            f"3; got {plain!r}."
        )
    return [Relabel(index, label) for index, label in plain.items()]


def _predictions(
    module: LightningModule, data: AttributedData, trajectory: Trajectory
) -> list[str]:
    """What the trained model predicts for each query, if the data module can say it in words."""
    if not isinstance(data, Describing):
        return []
    last = trajectory.checkpoints[trajectory.last_step]
    module.load_state_dict({**last.buffers, **last.parameters}, strict=False)
    module.eval()
    with torch.no_grad():
        return data.describe(torch.cat([module(batch[0]) for batch in data.val_dataloader()]))
