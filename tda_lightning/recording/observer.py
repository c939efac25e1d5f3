"""What watches one thing while a model trains."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from tda_lightning.recording.resume import RecorderState
from tda_lightning.recording.trained_parameters import TrainedParameters
from tda_lightning.records.trajectory import Facts
from tda_lightning.store.writer import TrajectoryWriter


class Observer:
    """One thing that a recorder records. Its methods are called in this order, and do nothing by
    default."""

    def attach(self, trainer: Trainer) -> None:
        """Listen to a trainer whose loaders and optimizer do not exist yet."""

    def begin(self, trainer: Trainer, trained: TrainedParameters) -> None:
        """Training starts."""

    def facts(self) -> dict[str, Any]:
        """What the facts of the run say about this."""
        return {}

    def resume(self, facts: Facts, state: RecorderState) -> None:
        """Continue the recorded run of ``facts`` from ``state``."""

    def begin_stage(self) -> None:
        """The optimizer trains other parameters from now on."""

    def begin_batch(self) -> None:
        """A batch has been fetched."""

    def end_backward(self) -> None:
        """The gradients of the batch have been added to those of the step."""

    def end_batch(self, outputs: Any) -> None:
        """The batch is done; ``outputs`` are those of its training step, None if not known."""

    def end_step(self, taken: bool) -> None:
        """The optimizer has taken a step, or skipped it."""

    def drop(self) -> None:
        """The gradients of the step under way are thrown away."""

    def write(self, writer: TrajectoryWriter, step: int, last: bool) -> None:
        """Write what has been observed up to a checkpoint after ``step`` steps.

        Args:
            writer: of the trajectory; every process calls it and the first one writes.
            step: counted from 1; the initial weights are step 0.
            last: the run, or a stage of it, ends here.
        """

    def state(self) -> dict[str, Any]:
        """Fields of the :class:`RecorderState` that travels in Lightning's checkpoints."""
        return {}

    def detach(self) -> None:
        """Leave everything as it was before :meth:`attach`."""
