"""Ensembles of runs that differ in chance alone, made from one recorded run.

A score of one run is partly that run's luck. The mean over an ensemble answers what training *like
this run* does with an example, and says how sure it is (``Scores.spread``).
"""

from tda_lightning.ensembles.dropout import drop_out
from tda_lightning.ensembles.forks import fork
from tda_lightning.ensembles.lora import adapt
from tda_lightning.ensembles.members import member, unfinished
from tda_lightning.ensembles.seeds import train
from tda_lightning.records.fresh_training import FreshTraining

__all__ = ["FreshTraining", "adapt", "drop_out", "fork", "member", "train", "unfinished"]
