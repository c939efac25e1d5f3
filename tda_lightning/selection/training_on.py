"""A recorded run trained on, step by step, on examples that were not in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tda_lightning.optimizers import apply_settings
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.replay.run import Replay, ReplaySnapshot, Walk
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.module_state import borrowed
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.tasks import AttributionTask


class TrainingOn(Walk):
    """Steps from the end of a run, in train mode, with its loss, optimizer and clipping.

    The optimizer goes on with the recorded states, or without any where they were not recorded.

    Args:
        rate: of all parameter groups; None: each group's mean over the recorded steps, as the last
            rate of a schedule may be 0.
        seed: for losses that draw random numbers.

    Attributes:
        where: weights, buffers and optimizer states so far.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        module: nn.Module,
        task: AttributionTask,
        source: ExampleSource,
        rate: float | None,
        seed: int,
    ) -> None:
        super().__init__(Replay(trajectory, module, task, source))
        means = trajectory.steps.learning_rate.mean(0).tolist()
        self._rates = means if rate is None else [rate] * len(means)
        self._seed, self._taken = seed, 0
        with borrowed(module):
            self.restart(trajectory.last_step)
            self.where: ReplaySnapshot = self.snapshot()

    def train(self, examples: Tensor) -> None:
        """One step on the mean loss of these examples of the source."""
        replay = self.replay
        last = replay.trajectory.last_step - 1
        with borrowed(replay.module), replay.as_trained(), unchanged_randomness():
            torch.manual_seed(self._seed + self._taken)
            self.resume_from(self.where)
            self.optimizer.zero_grad()
            replay.see(last, 0)
            batch = replay.fetch(examples)
            replay.loss_as_trained(batch, examples).backward()
            self._clip()
            apply_settings(replay.trajectory, self.optimizer, last)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self.optimizer.step()
            self.where = self.snapshot()
        self._taken += 1
