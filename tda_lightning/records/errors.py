"""The errors a caller may want to catch by name; everything else is a built-in type."""


class TrajectoryError(Exception):
    """Anything wrong with a recorded trajectory; the base of the errors below."""


class TrajectoryNotFoundError(TrajectoryError, FileNotFoundError):
    """The folder holds no trajectory."""


class TrajectoryExistsError(TrajectoryError, FileExistsError):
    """The folder already holds a trajectory and ``overwrite`` was not asked for."""


class TrajectoryLockedError(TrajectoryError):
    """Another recorder is writing into the folder."""


class TrajectoryFormatError(TrajectoryError, ValueError):
    """A file is damaged, of another kind, or of a format version that cannot be read."""


class TrajectoryMismatchError(TrajectoryError, ValueError):
    """The given model or training data are not the recorded ones."""


class UnsupportedTrainingError(TrajectoryError, ValueError):
    """The run used an optimizer or a training mode that attribution has no formula for."""


class ResumeError(UnsupportedTrainingError):
    """Training continues a run whose recorded trajectory is missing, or is not its own."""


class RecordingError(TrajectoryError, OSError):
    """The trajectory can no longer be written: the disk is full, the folder is gone, ..."""


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a score is NaN or infinite."""


class EngineError(RuntimeError):
    """Per-example gradients of a parameter cannot be computed exactly."""


class UnseenBatchError(ValueError):
    """A batch is made otherwise than those that a task or an engine was planned on."""
