"""Keeps trajectories, curvature and scores on disk."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tda_lightning.store.ensemble_file import read_ensemble, write_ensemble
    from tda_lightning.store.fingerprints import (
        compare_collation,
        compare_fingerprints,
        fingerprint,
    )
    from tda_lightning.store.reader import open_trajectory
    from tda_lightning.store.scores_file import read_scores, write_scores

__all__ = [
    "compare_collation",
    "compare_fingerprints",
    "fingerprint",
    "open_trajectory",
    "read_ensemble",
    "read_scores",
    "write_ensemble",
    "write_scores",
]

_HOMES = {
    "compare_collation": "tda_lightning.store.fingerprints",
    "compare_fingerprints": "tda_lightning.store.fingerprints",
    "fingerprint": "tda_lightning.store.fingerprints",
    "open_trajectory": "tda_lightning.store.reader",
    "read_ensemble": "tda_lightning.store.ensemble_file",
    "read_scores": "tda_lightning.store.scores_file",
    "write_ensemble": "tda_lightning.store.ensemble_file",
    "write_scores": "tda_lightning.store.scores_file",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: `tda inspect` reads files without torch, which takes seconds.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
