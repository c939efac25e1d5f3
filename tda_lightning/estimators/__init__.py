"""Estimators: each turns the recorded trajectory into scores in the project's one sign and unit."""

from tda_lightning.estimators.base import EnsembleEstimator, Estimator, StagedEstimator
from tda_lightning.estimators.fastif import FastInfluence
from tda_lightning.estimators.influence import InfluenceFunction
from tda_lightning.estimators.multi_stage import MultiStageInfluence
from tda_lightning.estimators.retrac import Retrac
from tda_lightning.estimators.source.estimator import Source
from tda_lightning.estimators.tracin import TracIn
from tda_lightning.estimators.trak import TRAK
from tda_lightning.estimators.unrolled.estimator import Unrolled

__all__ = [
    "TRAK",
    "EnsembleEstimator",
    "Estimator",
    "FastInfluence",
    "InfluenceFunction",
    "MultiStageInfluence",
    "Retrac",
    "Source",
    "StagedEstimator",
    "TracIn",
    "Unrolled",
]
