"""Are the scores right? Retraining, and what to compare with it."""

from tda_lightning.evaluation.judgements import (
    LeaveOneOut,
    agreement,
    as_removal,
    detection_auc,
    leave_one_out,
)
from tda_lightning.evaluation.lds import (
    Interval,
    difference,
    draw_subsets,
    linear_datamodeling_score,
)
from tda_lightning.evaluation.retraining import landing_error, measure, retrain, retrain_each
from tda_lightning.evaluation.smoothness import Estimate, Smoothness, smoothness

__all__ = [
    "Estimate",
    "Interval",
    "LeaveOneOut",
    "Smoothness",
    "agreement",
    "as_removal",
    "detection_auc",
    "difference",
    "draw_subsets",
    "landing_error",
    "leave_one_out",
    "linear_datamodeling_score",
    "measure",
    "retrain",
    "retrain_each",
    "smoothness",
]
