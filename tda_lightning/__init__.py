"""Which training examples caused this, by how much, and when in training?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tda_lightning.records import files

if TYPE_CHECKING:
    from tda_lightning.attribution.module import AttributionModule
    from tda_lightning.index import AttributionIndex
    from tda_lightning.live import TdaReport
    from tda_lightning.recording import TrajectoryRecorder
    from tda_lightning.records.ensemble import Ensemble
    from tda_lightning.records.scores import Scores
    from tda_lightning.records.trajectory import Trajectory

__all__ = [
    "AttributionIndex",
    "AttributionModule",
    "Ensemble",
    "Scores",
    "TdaReport",
    "Trajectory",
    "TrajectoryRecorder",
]

_HOMES = {
    "AttributionIndex": "tda_lightning.index",
    "AttributionModule": "tda_lightning.attribution.module",
    "Ensemble": "tda_lightning.records.ensemble",
    "Scores": "tda_lightning.records.scores",
    "TdaReport": "tda_lightning.live",
    "Trajectory": "tda_lightning.records.trajectory",
    "TrajectoryRecorder": "tda_lightning.recording",
}

# Records may not import the store and the exports, which stand above them.
files.import_folder = lambda folder: import_module(f"tda_lightning.{folder}")


def __getattr__(name: str) -> Any:
    # Imported when asked for: Lightning takes seconds, and `tda --help` should not.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
