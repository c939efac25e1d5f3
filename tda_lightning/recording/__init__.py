"""Records training runs."""

from tda_lightning.recording.recorder import TrajectoryRecorder

__all__ = ["TrajectoryRecorder"]
