"""Keeps trajectories, curvature and scores on disk."""

from tda_lightning.store.ensemble_file import read_ensemble, write_ensemble
from tda_lightning.store.fingerprint import compare_fingerprints, fingerprint
from tda_lightning.store.reader import open_trajectory
from tda_lightning.store.scores_file import read_scores, write_scores

__all__ = [
    "compare_fingerprints",
    "fingerprint",
    "open_trajectory",
    "read_ensemble",
    "read_scores",
    "write_ensemble",
    "write_scores",
]
