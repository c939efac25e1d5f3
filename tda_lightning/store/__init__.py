"""Keeps trajectories, curvature and scores on disk."""

from tda_lightning.store.fingerprint import compare_fingerprints, fingerprint
from tda_lightning.store.reader import open_trajectory

__all__ = ["compare_fingerprints", "fingerprint", "open_trajectory"]
