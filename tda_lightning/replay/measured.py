"""A replay that measures what a recorder does, so that what it trains is a trajectory too."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from tda_lightning.records.errors import NonFiniteError
from tda_lightning.records.trajectory import Steps
from tda_lightning.replay.run import Replay, Walk


class MeasuredWalk(Walk):
    """Measures the loss of every step, and the length of its gradient before and after clipping."""

    def __init__(self, replay: Replay) -> None:
        super().__init__(replay)
        self._measured: list[tuple[float, float, float]] = []
        self._norm = self._ratio = 1.0

    def measured_step(self, row: int) -> None:
        """Train one step.

        Raises:
            NonFiniteError: its loss is not finite.
        """
        loss, _ = self.step(row)
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss of step {row + 1} is {loss}")
        self._measured.append((loss, self._norm, self._ratio))

    def measured_rows(self, stop: int) -> Steps:
        """The rows up to ``stop`` that were trained since this was called last, with this run's own
        measurements."""
        losses, norms, ratios = torch.tensor(self._measured, dtype=torch.float64).T
        rows = self.replay.trajectory.steps.between(stop - len(losses), stop)
        self._measured = []
        return replace(rows, loss=losses, gradient_norm=norms, clipping=ratios)

    def on_gradients(self, row: int) -> None:
        self._norm, self._ratio = self._length(), 1.0

    def _clip(self) -> float:
        clipping = super()._clip()
        if self.replay.clip and self._norm > 0:
            self._ratio = self._length() / self._norm
        return clipping

    def _length(self) -> float:
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norms = [gradient.norm() for gradient in gradients]
        return float(torch.stack(norms).norm()) if norms else 0.0
