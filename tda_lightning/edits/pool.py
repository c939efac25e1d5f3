"""Examples that were not in training: which of them would help."""

from __future__ import annotations

from typing import Any

from tda_lightning.edits.edits import Addition
from tda_lightning.records.provenance import PoolRecord
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.loading import ExampleSource

_NAMED = 100  # of the examples that are in training too


def additions(pool: Any) -> list[Addition]:
    """The addition of each example of a pool, a data set whose items are like those of the training
    set.

    Raises:
        TypeError: it cannot be read by index.
        ValueError: it is empty.
    """
    if not hasattr(pool, "__getitem__") or not hasattr(pool, "__len__"):
        raise TypeError(
            "pool must be a data set that is read by index, with items like those of the training "
            f"set; got {type(pool).__name__}."
        )
    if not len(pool):
        raise ValueError("The pool is empty: there is nothing to add.")
    return [Addition(pool[index]) for index in range(len(pool))]


def known_examples(edits: list[Addition], source: ExampleSource) -> dict[int, int]:
    """The examples of a pool that the training set holds already: its index there, by column."""
    first: dict[str, int] = {}
    for index in range(len(source)):
        first.setdefault(digest(source.dataset[index]), index)
    own = [first.get(digest(edit.example)) for edit in edits]
    return {column: index for column, index in enumerate(own) if index is not None}


def pool_record(edits: list[Addition], source: ExampleSource) -> PoolRecord:
    """How large a pool is, and which of its examples the training set holds already."""
    known = [[column, index] for column, index in known_examples(edits, source).items()]
    return {"size": len(edits), "in_training": len(known), "same": known[:_NAMED]}


def pool_notes(record: PoolRecord) -> list[str]:
    """What a reader should know about an overlap."""
    if not record["in_training"]:
        return []
    column, index = record["same"][0]
    return [
        f"{record['in_training']} of the {record['size']} examples of the pool are in the training "
        f"set already (the first: {column} is training example {index}). Their scores are about "
        "having them once more."
    ]
