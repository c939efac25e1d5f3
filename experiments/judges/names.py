"""What is judged: our estimators, with the share of the data that stays, and others' wrappers."""

from __future__ import annotations

from tda_lightning.estimators import InfluenceFunction, Source, TracIn

OURS = {
    "TracIn": (TracIn, 1.0),
    "EK-FAC": (InfluenceFunction, 1.0),
    "SOURCE": (Source, 1.0),
    "SOURCE, keep=0.5": (Source, 0.5),
}
THEIRS = ("CaptumSimilarity", "CaptumTracInCP", "CaptumTracInCPFast", "TRAK", "RepresenterPoints")
BASELINE = "Random"
METHODS = (*OURS, *THEIRS, BASELINE)
BRITTLE_QUERIES = 24  # of the study of brittleness
