"""Edits of the training set: what the columns of scores are about.

By default column n is the removal of training example n. ``attribute(..., edits=[...])`` asks for
others; a new kind of edit is a class with ``index`` and ``terms``.
"""

from tda_lightning.edits.edit_set import EditSet
from tda_lightning.edits.edits import Addition, Edit, Relabel, Removal, Replace, Term
from tda_lightning.edits.edits_file import load_edits, save_edits

__all__ = [
    "Addition",
    "Edit",
    "EditSet",
    "Relabel",
    "Removal",
    "Replace",
    "Term",
    "load_edits",
    "save_edits",
]
