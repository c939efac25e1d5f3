"""Which training examples caused this, by how much, and when in training?"""

from tda_lightning.attribution import AttributionModule
from tda_lightning.callbacks import TrajectoryRecorder
from tda_lightning.scores import Scores
from tda_lightning.trajectory import Trajectory

__all__ = ["AttributionModule", "Scores", "Trajectory", "TrajectoryRecorder"]
