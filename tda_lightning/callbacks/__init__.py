"""Records training runs."""

from tda_lightning.callbacks.recorder import TrajectoryRecorder

__all__ = ["TrajectoryRecorder"]
