"""Edits of the training set: what the columns of scores are about.

By default column n is the removal of training example n. ``attribute(..., edits=[...])`` asks for
others; a new kind of edit is a class with ``index`` and ``terms``. Of a run on one graph, edits of
the graph (``graph_edits.py``) can be asked about instead.
"""

from tda_lightning.edits.documents import (
    DocumentRemoval,
    document_removals,
    sum_by_document,
)
from tda_lightning.edits.edit_set import EditSet
from tda_lightning.edits.edits import Addition, Edit, Relabel, Removal, Replace, Term
from tda_lightning.edits.edits_file import load_edits, save_edits
from tda_lightning.edits.graph_edit_set import EditedGraphs, GraphEditSet
from tda_lightning.edits.graph_edits import (
    AddEdges,
    GraphEdit,
    RemoveEdges,
    RemoveFeatures,
    RemoveNodes,
)
from tda_lightning.edits.pool import additions, known_examples, pool_notes, pool_record

__all__ = [
    "AddEdges",
    "Addition",
    "DocumentRemoval",
    "Edit",
    "EditSet",
    "EditedGraphs",
    "GraphEdit",
    "GraphEditSet",
    "Relabel",
    "Removal",
    "RemoveEdges",
    "RemoveFeatures",
    "RemoveNodes",
    "Replace",
    "Term",
    "additions",
    "document_removals",
    "known_examples",
    "load_edits",
    "pool_notes",
    "pool_record",
    "save_edits",
    "sum_by_document",
]
