"""Weights of training examples, and training with them."""

from tda_lightning.reweighting.balanced import Balance, balanced_weights, imbalance
from tda_lightning.reweighting.from_scores import predicted_change, weights_from_scores
from tda_lightning.reweighting.projection import check_weights, project

__all__ = [
    "Balance",
    "balanced_weights",
    "check_weights",
    "imbalance",
    "predicted_change",
    "project",
    "weights_from_scores",
]
