"""What scores say of each training example over all queries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tda_lightning.records.scores import Scores


def training_table(scores: Scores) -> dict[str, np.ndarray[Any, Any]]:
    """Columns with an entry for each training example, in the order of the training set.

    ``train``, its index; ``self_influence``, if the scores have it; ``helped`` and ``harmed``, for
    how many queries its score is positive and negative; ``mean_score`` over the queries, the
    predicted change of the mean measurement if it were removed.

    Raises:
        ValueError: the columns of the scores are edits, or not all examples have a score.
    """
    if "edits" in scores.provenance:
        raise ValueError(
            "The columns of these scores are edits, expected training examples. Attribute without "
            "edits."
        )
    if not scores.is_complete:
        raise ValueError(
            f"Only {scores.num_scored} of {scores.num_train} training examples were scored for "
            "each query, so examples cannot be compared. Score all of them, with "
            "InfluenceFunction for example."
        )
    table = {"train": np.arange(scores.num_train)}
    if scores.self_influence is not None:
        table["self_influence"] = scores.self_influence.numpy()
    helped = torch.zeros(scores.num_train, dtype=torch.int64)
    harmed, total = helped.clone(), scores.values.new_zeros(scores.num_train).double()
    for row in scores.values:  # the file may be larger than memory
        helped += row > 0
        harmed += row < 0
        total += row
    mean = total / max(1, scores.num_queries)
    return {**table, "helped": helped.numpy(), "harmed": harmed.numpy(), "mean_score": mean.numpy()}
