"""``tda train``."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

from tda_lightning.cli.command import clear_errors, file_name
from tda_lightning.cli.edited_data import apply_drop
from tda_lightning.cli.run_config import save_config
from tda_lightning.cli.trainers import configured_trainer


@clear_errors
def train(config: DictConfig) -> None:
    """Train a model from scratch and record its trajectory."""
    config.output = str(output_folder(config))
    data = instantiate(config.data, _convert_="all")
    data.setup()  # finds missing files before anything is written
    data = apply_drop(config, data)
    seed_everything(config.seed, workers=True, verbose=False)
    module = instantiate(config.model, _convert_="all")
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
    print(f"Recorded {trainer.global_step} steps in {config.output}{left_out}{metrics}")


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
