"""Models of the examples: LightningModules in plain torch, configured by Hydra."""

from tda_lightning.examples.models.adapted import AdaptedGPT2
from tda_lightning.examples.models.encoder import Encoder
from tda_lightning.examples.models.gpt import GPT
from tda_lightning.examples.models.modules import (
    Classifier,
    LanguageModel,
    Regressor,
    TrainedModule,
)
from tda_lightning.examples.models.networks import CNN, MLP, ResNet9
from tda_lightning.examples.models.pretrained import Pretrained
from tda_lightning.examples.models.schedules import constant, cosine, linear, one_cycle
from tda_lightning.examples.models.unet import Denoiser, NoiseSchedule, UNet

__all__ = [
    "CNN",
    "GPT",
    "MLP",
    "AdaptedGPT2",
    "Classifier",
    "Denoiser",
    "Encoder",
    "LanguageModel",
    "NoiseSchedule",
    "Pretrained",
    "Regressor",
    "ResNet9",
    "TrainedModule",
    "UNet",
    "constant",
    "cosine",
    "linear",
    "one_cycle",
]
