"""How long and how large an attribution will be, found out by rehearsing a little of it."""

from tda_lightning.planning import clock
from tda_lightning.planning.memory import PeakMemory
from tda_lightning.planning.records import AttributionPlan, PassPlan, comparison
from tda_lightning.planning.rehearsal import Rehearsal

__all__ = ["AttributionPlan", "PassPlan", "PeakMemory", "Rehearsal", "clock", "comparison"]
