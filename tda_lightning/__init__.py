"""Training data attribution for PyTorch Lightning.

Record a run once with :class:`TrajectoryRecorder`; afterwards :class:`AttributionModule` answers
which training examples caused a prediction, how much, and when in training.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tda_lightning.attribution import AttributionModule
    from tda_lightning.callbacks import TrajectoryRecorder
    from tda_lightning.scores import Scores
    from tda_lightning.trajectory import Trajectory

_HOME = {
    "AttributionModule": "tda_lightning.attribution",
    "Scores": "tda_lightning.scores",
    "Trajectory": "tda_lightning.trajectory",
    "TrajectoryRecorder": "tda_lightning.callbacks",
}

__all__ = ["AttributionModule", "Scores", "Trajectory", "TrajectoryRecorder"]


def __getattr__(name: str) -> Any:
    # On first use: torch and Lightning take seconds that `tda --help` need not wait.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
