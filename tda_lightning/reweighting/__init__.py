"""Weights of training examples, and training with them."""

from tda_lightning.reweighting.balanced import Balance, balanced_weights, imbalance
from tda_lightning.reweighting.from_scores import predicted_change, weights_from_scores
from tda_lightning.reweighting.projection import check_weights, project
from tda_lightning.reweighting.weighted_training import WeightedTraining
from tda_lightning.reweighting.weights_file import load_weights, save_weights

__all__ = [
    "Balance",
    "WeightedTraining",
    "balanced_weights",
    "check_weights",
    "imbalance",
    "load_weights",
    "predicted_change",
    "project",
    "save_weights",
    "weights_from_scores",
]
