"""How often a run drew its examples, by plain loops."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from tda_lightning.records.trajectory import Trajectory


def drawn_weights(trajectory: Trajectory, start: int, stop: int, count: int) -> Tensor:
    """Weight of each example [count] in steps start < t <= stop, whose mean is 1: each step counts
    what its whole epoch drew."""
    steps = trajectory.steps
    weights = torch.zeros(count, dtype=torch.float64)
    rows = range(trajectory.last_step)
    for _, group in groupby(rows, key=lambda row: int(steps.epoch[row])):
        epoch = list(group)
        drawn = [n for row in epoch for batch in steps.batches(row) for n in batch.tolist()]
        for row in epoch:
            if start <= row < stop:
                for n in drawn:
                    weights[n] += 1 / len(drawn)
    return weights * count / (stop - start)
