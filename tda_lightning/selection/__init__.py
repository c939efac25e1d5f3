"""Which examples of a pool to train on, so that a model does better on a target."""

from tda_lightning.selection.selecting import select
from tda_lightning.selection.selection import Choice, Selection

__all__ = ["Choice", "Selection", "select"]
