"""What is judged: our estimators with their share of the data, and wrappers that come with quanda."""

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
