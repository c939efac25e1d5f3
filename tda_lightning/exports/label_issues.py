"""Suspect labels, in cleanlab's form: what ``CleanLearning.fit(label_issues=...)`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tda_lightning.exports.packages import needed
from tda_lightning.records.scores import Scores

if TYPE_CHECKING:
    import pandas


def label_quality(scores: Scores) -> np.ndarray[Any, Any]:
    """A number in 0 to 1 for each training example, lower for a more suspect label, as cleanlab
    has it: the share of the examples with a larger self-influence, or as large and before it.

    Raises:
        ValueError: the scores have no self-influence.

    Example:
        >>> import torch
        >>> label_quality(Scores(torch.zeros(1, 4), self_influence=torch.tensor([3.0, 1, 9, 2])))
        array([0.25, 0.75, 0.  , 0.5 ])
    """
    if scores.self_influence is None:
        raise ValueError(
            "Suspect labels are those of large self-influence, and these scores have none. "
            "Attribute with self_influence=True."
        )
    order = np.argsort(-scores.self_influence.numpy(), kind="stable")
    quality = np.empty(len(order))
    quality[order] = np.arange(len(order)) / max(1, len(order))
    return quality


def label_issues(
    scores: Scores, share: float, labels: Sequence[object] | None = None
) -> pandas.DataFrame:
    """The table of label issues that cleanlab works with.

    A row for each training example, in order: ``is_label_issue``, whether it is among the ``share``
    most suspect; ``label_quality`` (:func:`label_quality`); ``given_label``, if ``labels`` are
    given. Self-influence is no probability, so there is no ``predicted_label``, and how many labels
    are wrong is for the caller to say: ``share``.

    Args:
        share: of the training examples that are marked, in 0 to 1.
        labels: of the training set, in its order.

    Raises:
        ImportError: pandas is not installed.
        ValueError: the scores have no self-influence, or the arguments do not fit.

    References:
        | Confident Learning (Northcutt et al., 2021), https://arxiv.org/abs/1911.00068, whose
          implementation cleanlab is; the ranking is that of the mislabelled examples in
          Estimating Training Data Influence by Tracing Gradient Descent (Pruthi et al., 2020),
          section 4.1.
    """
    if not 0 <= share <= 1:
        raise ValueError(
            f"share is the part of the training examples to mark: expected 0 to 1, got {share!r}."
        )
    if labels is not None and len(labels) != scores.num_train:
        raise ValueError(
            f"labels must hold one for each of the {scores.num_train} training examples, got "
            f"{len(labels)}."
        )
    package = needed("pandas", "pandas", "label_issues")
    quality = label_quality(scores)
    marked = round(share * len(quality))
    table: dict[str, Any] = {
        # The qualities are 0, 1/N, 2/N, ...: each rank once.
        "is_label_issue": np.argsort(np.argsort(quality)) < marked,
        "label_quality": quality,
    }
    if labels is not None:
        table["given_label"] = list(labels)
    frame: pandas.DataFrame = package.DataFrame(table)
    return frame
