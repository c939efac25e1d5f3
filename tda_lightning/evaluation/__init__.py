"""Are the scores right? Retraining, and what to compare with it."""

from tda_lightning.evaluation.additive import additive_ceiling, fitted_linear_model
from tda_lightning.evaluation.baselines import (
    BASELINES,
    OF_TEXT,
    activation_cosine,
    last_checkpoint,
    last_layer_cosine,
    random_scores,
    self_loss,
)
from tda_lightning.evaluation.ceilings import Ceiling, seed_ceiling
from tda_lightning.evaluation.clusters import feature_clusters
from tda_lightning.evaluation.configuration import draw_seeds, truth_configuration
from tda_lightning.evaluation.from_scratch import retrain_from_scratch
from tda_lightning.evaluation.judgements import (
    RemovalAgreement,
    agreement,
    as_removal,
    detection_auc,
    found_within,
    group_removal,
    leave_one_out,
    predicted_changes,
    slope_and_correlation,
)
from tda_lightning.evaluation.lexical import bm25, token_numbers
from tda_lightning.evaluation.linear_datamodeling import (
    Interval,
    NothingToRankError,
    difference,
    draw_subsets,
    interval_over_subsets,
    linear_datamodeling_score,
)
from tda_lightning.evaluation.proximal_bregman import each_response, proximal_bregman_response
from tda_lightning.evaluation.randomised import randomised
from tda_lightning.evaluation.retraining import landing_error, measure, retrain, retrain_each
from tda_lightning.evaluation.retrieval import (
    average_precision,
    recall_within,
    reciprocal_rank,
    shared_group,
    times_similarity,
    top_cardinality,
)
from tda_lightning.evaluation.simulatability import (
    Simulation,
    chosen_examples,
    fine_tuned_changes,
    simulatability,
)
from tda_lightning.evaluation.smoothness import Estimate, Smoothness, smoothness
from tda_lightning.evaluation.top_removal import (
    TopRemoval,
    compare_removals,
    num_tokens,
    predicted_classes,
    removals,
    require_tokens,
    token_removals,
    top_removal,
)
from tda_lightning.evaluation.unlearning import (
    UnlearningReport,
    accuracy,
    compare_unlearned,
    membership,
)
from tda_lightning.records.fresh_training import FreshTraining
from tda_lightning.records.ground_truth import GroundTruth
from tda_lightning.records.representatives import Representatives, representatives

__all__ = [
    "BASELINES",
    "OF_TEXT",
    "Ceiling",
    "Estimate",
    "FreshTraining",
    "GroundTruth",
    "Interval",
    "NothingToRankError",
    "RemovalAgreement",
    "Representatives",
    "Simulation",
    "Smoothness",
    "TopRemoval",
    "UnlearningReport",
    "accuracy",
    "activation_cosine",
    "additive_ceiling",
    "agreement",
    "as_removal",
    "average_precision",
    "bm25",
    "chosen_examples",
    "compare_removals",
    "compare_unlearned",
    "detection_auc",
    "difference",
    "draw_seeds",
    "draw_subsets",
    "each_response",
    "feature_clusters",
    "fine_tuned_changes",
    "fitted_linear_model",
    "found_within",
    "group_removal",
    "interval_over_subsets",
    "landing_error",
    "last_checkpoint",
    "last_layer_cosine",
    "leave_one_out",
    "linear_datamodeling_score",
    "measure",
    "membership",
    "num_tokens",
    "predicted_changes",
    "predicted_classes",
    "proximal_bregman_response",
    "random_scores",
    "randomised",
    "recall_within",
    "reciprocal_rank",
    "removals",
    "representatives",
    "require_tokens",
    "retrain",
    "retrain_each",
    "retrain_from_scratch",
    "seed_ceiling",
    "self_loss",
    "shared_group",
    "simulatability",
    "slope_and_correlation",
    "smoothness",
    "times_similarity",
    "token_numbers",
    "token_removals",
    "top_cardinality",
    "top_removal",
    "truth_configuration",
]
