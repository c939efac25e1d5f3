"""What the columns of the scores are: training examples, documents, a pool, or edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch.utils.data import DataLoader

from tda_lightning.attribution.graph_sources import NodeSource
from tda_lightning.edits import (
    Addition,
    Edit,
    EditSet,
    GraphEdit,
    GraphEditSet,
    additions,
    document_removals,
)
from tda_lightning.edits.documents import holds_documents
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.runtime.loading import ExampleSource


def pool_additions(pool: object, edits: Sequence[object] | None) -> list[Addition] | None:
    """The addition of every example of a pool; None without a pool."""
    if pool is None:
        return None
    if edits is not None:
        raise ValueError(
            "pool and edits both say what the columns are about: give one of them. "
            "Addition(example) is the edit that adds an example."
        )
    return additions(pool.dataset if isinstance(pool, DataLoader) else pool)


def packed_documents(source: ExampleSource) -> Sequence[Edit] | None:
    """The removals of documents where the rows of the training set hold several each; None for
    those of rows.

    A loader that reads whole batches of a kind of its own has no rows to look at.
    """
    if not len(source) or source.keys is not None:
        return None
    dataset = source.dataset
    return document_removals(dataset) if holds_documents(dataset[0]) else None


def edit_set(
    edits: Sequence[Edit | GraphEdit] | None, source: ExampleSource, stages: int
) -> EditSet | GraphEditSet | None:
    """The edits, checked against the training set that they change; None without edits.

    Raises:
        UnsupportedTrainingError: several stages, or edits of a graph where there is none.
        ValueError: edits of the graph and of examples at once; an edit that does not fit.
    """
    if edits is None:
        return None
    if stages > 1:
        raise UnsupportedTrainingError(
            f"edits belong to one training set, and the run has {stages} stages. "
            "Attribute each of them, Trajectory.load(path).stages(), with its own edits."
        )
    of_graph = [isinstance(edit, GraphEdit) for edit in edits]
    if not any(of_graph):
        return EditSet(cast(Sequence[Edit], edits), source)
    if not all(of_graph):
        raise ValueError(
            "edits are of the graph or of single examples, got both. Ask for them one by one."
        )
    if not isinstance(source, NodeSource):
        raise UnsupportedTrainingError(
            f"{type(edits[0]).__name__} is an edit of the graph that a run was trained on, and "
            "this training set is none: expected one graph with a mask of training nodes "
            "(task=None), or tda_lightning.tasks.NodeTask."
        )
    return GraphEditSet(cast(Sequence[GraphEdit], edits), source)
