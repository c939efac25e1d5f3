"""dattri's metrics on the same matrices as ours, side by side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tda_lightning.evaluation import detection_auc, linear_datamodeling_score


def datamodeling(
    values: Mapping[str, Tensor], subsets: Tensor, outcomes: Tensor
) -> dict[str, list[float]]:
    """dattri's LDS, ours with its interval, and the largest difference of a query's.

    Args:
        values: scores [query, train] by name.
        subsets: bool [subset, train].
        outcomes: losses [subset, query]; dattri takes their negative.
    """
    from dattri.metric import lds

    kept = torch.stack([row.nonzero().squeeze(1) for row in subsets])
    found = {}
    for name, own in values.items():
        theirs, _ = lds(own.double().T, (-outcomes.double(), kept))
        ours = linear_datamodeling_score(own, subsets, outcomes)
        apart = float((theirs - ours.per_query).abs().max())
        found[name] = [float(theirs.mean()), ours.value, ours.low, ours.high, apart]
    return found


def wrong_labels(self_influence: Mapping[str, Tensor], wrong: Tensor) -> dict[str, list[float]]:
    """dattri's area under the ROC curve, and ours."""
    from dattri.metric import mislabel_detection_auc

    return {
        name: [float(mislabel_detection_auc(own, wrong)[0]), detection_auc(own, wrong)]
        for name, own in self_influence.items()
    }
