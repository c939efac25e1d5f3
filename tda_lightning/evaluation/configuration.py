"""The configuration of retrainings: what determines their outcomes, and their seeds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.store.fingerprints import fingerprint
from tda_lightning.tasks import AttributionTask, as_task


def truth_configuration(
    trajectory: Trajectory,
    module: nn.Module,
    task: AttributionTask | None,
    queries: object,
    training: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Digests of everything that determines the outcome of a retraining, besides subset and seed:
    ``GroundTruth.configuration``.

    Args:
        trajectory: the recorded run, identified by its data, steps and weights.
        module: its class and shapes matter.
        task: gives the measurement.
        queries: a data set or a loader over it.
        training: settings of training from scratch; None for a replay.
    """
    facts, steps = trajectory.facts, trajectory.steps
    ends = [trajectory.checkpoints[step].parameters for step in (0, trajectory.last_step)]
    shapes = {name: list(tensor.shape) for name, tensor in module.named_parameters()}
    configuration: dict[str, object] = {
        "run": digest([facts.settings.get("run_id"), steps.examples, steps.learning_rate, *ends]),
        "data": digest([facts.num_examples, facts.fingerprint]),
        "model": digest([type(module).__name__, shapes]),
        "task": as_task(task).settings(),
        "queries": digest(fingerprint(ExampleSource.of(queries, 1, "query").dataset)),
    }
    if training is not None:
        configuration["training"] = digest(training)
    return configuration


def draw_seeds(subsets: int, seeds: int, seed: int = 0) -> Tensor:
    """A different seed for every retraining, int64 [subset, seed], independent of how many there
    are.

    Example:
        >>> bool((draw_seeds(2, 2)[:, :1] == draw_seeds(2, 1)).all())
        True
    """
    rows = [
        [
            int(np.random.SeedSequence([seed, row, column]).generate_state(1)[0] >> 1)
            for column in range(seeds)
        ]
        for row in range(subsets)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(subsets, seeds)
