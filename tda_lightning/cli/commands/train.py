"""``tda train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from tda_lightning.cli.added_data import apply_extra
from tda_lightning.cli.command import clear_errors, file_name
from tda_lightning.cli.edited_data import apply_drop
from tda_lightning.cli.own_config import read_own_config, require_class
from tda_lightning.cli.own_module import OPTIMIZER, SCHEDULER, build_module
from tda_lightning.cli.run_config import save_config
from tda_lightning.cli.trainers import configured_trainer


@clear_errors
def train(config: DictConfig) -> None:
    """Train a model from scratch and record its trajectory."""
    adopt_configuration(config)
    config.output = str(output_folder(config))
    data = instantiate(config.data, _convert_="all")
    if hasattr(type(data), "query_dataset"):
        data.setup("fit")  # finds missing files before anything is written
    data, extra = apply_extra(config, apply_drop(config, data))
    seed_everything(config.seed, workers=True, verbose=False)
    module = build_module(config, trust=True)  # what is named on the command line is trusted
    recorder = instantiate(config.recorder, _convert_="all")
    trainer = configured_trainer(config.trainer, [recorder, SaveConfig(config)], progress=True)
    try:
        trainer.fit(module, datamodule=data)
    except (KeyboardInterrupt, SystemExit):
        # Lightning exits without a message.
        print(
            f"Interrupted after {trainer.global_step} steps. What was recorded in {config.output} "
            "can be inspected and attributed.",
            file=sys.stderr,
        )
        raise
    metrics = "".join(
        f", {name} {float(value):.4g}" for name, value in sorted(trainer.callback_metrics.items())
    )
    left_out = ""
    if config.drop is not None:
        out, labels = len(config.drop.left_out), len(config.drop.relabelled)
        left_out = f", without {out} training examples and with {labels} other labels"
    if extra:
        left_out += f", with {extra} extra examples"
    print(f"Recorded {trainer.global_step} steps in {config.output}{left_out}{metrics}")


def adopt_configuration(config: DictConfig) -> None:
    """Take data, model, optimizer and trainer from ``config=FILE``, where one is given; what the
    command line says of them comes last."""
    if config.config is None:
        return
    own, given = read_own_config(config.config, complete=False), HydraConfig.get().overrides.task
    OmegaConf.set_struct(config, False)
    for name in ("data", "model"):
        node = config[name]
        added = {key: node[key] for key in node if not OmegaConf.is_missing(node, key)}
        config[name] = OmegaConf.merge(own.get(name, {}), added)
        require_class(config, name, config.config)
    if "trainer" in own:
        changes = [text.lstrip("+") for text in given if text.lstrip("+").startswith("trainer.")]
        changed = OmegaConf.from_dotlist(changes).get("trainer", {})
        trainer: Any = OmegaConf.merge({"_target_": config.trainer._target_}, own.trainer, changed)
        callbacks: Any = trainer.get("callbacks") or []
        callbacks = callbacks if OmegaConf.is_list(callbacks) else [callbacks]
        # This command brings its own.
        trainer.callbacks = [
            c for c in callbacks if not str(c.get("_target_")).endswith("TrajectoryRecorder")
        ]
        config.trainer = trainer
    for key, name in ((OPTIMIZER, "optimizer"), (SCHEDULER, "lr_scheduler")):
        if name in own:
            config[key] = own[name]
    if "seed" in own and not any(text.startswith("seed=") for text in given):
        config.seed = own.seed


def output_folder(config: DictConfig) -> Path:
    """Where to record; each run of a sweep gets a folder of its own, named after its settings."""
    folder = Path(config.output)
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return folder
    shared = ("experiment=", "output=", "overwrite=")
    settings = [given for given in hydra.overrides.task if not given.startswith(shared)]
    return folder / (file_name(settings) or str(hydra.job.num))


class SaveConfig(Callback):
    """Writes the configuration next to the trajectory once the recorder has taken the folder."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            Path(self.config.output).mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.config.output)
