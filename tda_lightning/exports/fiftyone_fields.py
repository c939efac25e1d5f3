"""Scores as fields of the samples of a FiftyOne data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tda_lightning.exports.training_examples import training_table
from tda_lightning.records.scores import Scores


def add_to_fiftyone(samples: Any, scores: Scores, queries: Sequence[int] = ()) -> list[str]:
    """Add what scores say of each training example to the samples of a FiftyOne data set or view,
    to be sorted and filtered by in its app.

    Sample n must be training example n. Fields: ``tda_index``, ``tda_self_influence`` (if there
    is one), ``tda_helped``, ``tda_harmed``, ``tda_mean_score``
    (:func:`~tda_lightning.exports.training_table`), and ``tda_query_3`` with the scores for each
    query that is asked for. Existing fields of these names are replaced.

    Args:
        samples: ``fiftyone.Dataset`` or view, anything with its ``set_values`` and ``len``.
        queries: whose scores are added.

    Returns:
        The names of the fields.

    Raises:
        IndexError: there is no such query.
        ValueError: another number of samples than training examples.
    """
    if len(samples) != scores.num_train:
        raise ValueError(
            f"Sample n must be training example n: expected {scores.num_train} samples, got "
            f"{len(samples)}. Choose them with a view, in the order of the training set."
        )
    table = training_table(scores)
    fields = {f"tda_{'index' if name == 'train' else name}": v for name, v in table.items()}
    fields |= {f"tda_query_{query}": scores[query].values.numpy() for query in queries}
    for name, values in fields.items():
        samples.set_values(name, values.tolist())
    return list(fields)
