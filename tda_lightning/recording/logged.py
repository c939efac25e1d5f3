"""What a recorder tells Lightning's loggers while it records: disk written, checkpoints, time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer

from tda_lightning.store import layout


class RecordingLog:
    """Logs after each checkpoint, with the trainer's loggers and under ``tda/``.

    Attributes:
        seconds: spent in the recorder's hooks so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = 0.0
        self._logged = 0

    def restart(self) -> None:
        """A fit begins."""
        self.seconds, self._logged = 0.0, 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of a hook."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def log(self, trainer: Trainer, checkpoints: int, last: bool = False) -> None:
        """Log if there are more checkpoints than before, or for the ``last`` time: loggers write to
        disk too."""
        if (
            (checkpoints == self._logged and not last)
            or not trainer.loggers
            or not trainer.is_global_zero
        ):
            return
        self._logged = checkpoints
        metrics = {"tda/checkpoints": float(checkpoints), "tda/recorder_seconds": self.seconds}
        metrics["tda/disk_bytes"] = _size(layout.recorded_files(self.path))
        if statistics := layout.statistics_files(self.path).values():
            metrics["tda/statistics_bytes"] = _size([*statistics])
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


def _size(files: list[Path]) -> float:
    return float(sum(file.stat().st_size for file in files if file.exists()))
