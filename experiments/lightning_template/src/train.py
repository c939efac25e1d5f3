"""The training script of an application in the shape of lightning-hydra-template.

cd experiments/lightning_template
python src/train.py hydra.run.dir=runs/points
tda attribute runs/points/trajectory config=runs/points/.hydra/config.yaml self_influence=true
tda report runs/points/trajectory/scores/source.h5 config=runs/points/.hydra/config.yaml
"""

import sys
from pathlib import Path

import hydra
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

sys.path.append(str(Path(__file__).parents[1]))  # as the template does by rootutils


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    """Train; nothing here knows of attribution but the callback in the configuration."""
    seed_everything(config.seed, workers=True, verbose=False)
    datamodule, model = instantiate(config.data), instantiate(config.model)
    callbacks = [instantiate(callback) for callback in config.callbacks.values()]
    instantiate(config.trainer, callbacks=callbacks).fit(model, datamodule)


if __name__ == "__main__":
    main()
