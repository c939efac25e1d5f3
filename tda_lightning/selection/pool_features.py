"""Features of examples outside of the training set, at the end of a run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tda_lightning.estimators.features import read_features
from tda_lightning.evaluation.retraining import of_each_batch
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import AttributionTask, run_training_step
from tda_lightning.tasks.example_seeds import active_examples


def features_of(
    module: nn.Module,
    task: AttributionTask,
    trajectory: Trajectory,
    source: ExampleSource,
    layer: str | None,
) -> Tensor:
    """What FastIF's neighbours are found by (``estimators/features.py``): float32
    [example, feature].

    Raises:
        ValueError: they are not alike for all examples, or the layer has none.
        NonFiniteError: one is not finite.
    """

    def read(batch: object) -> tuple[Tensor, str]:
        examples = active_examples()
        assert examples is not None

        def forward() -> int:
            if hasattr(module, "training_step"):
                run_training_step(module, batch)
            else:
                task.train_loss(module, batch)
            return len(examples)

        return read_features(module, layer, forward)

    last = trajectory.checkpoints[trajectory.last_step]
    state = {**last.buffers, **last.parameters}
    parts = of_each_batch(read, module, state, source, trajectory=trajectory)
    kinds = {(name, values.shape[1]) for values, name in parts}
    if len(kinds) > 1:
        found = ", ".join(f"{width} of {name}" for name, width in sorted(kinds))
        raise ValueError(
            f"Features must be alike for all examples, got {found}. Name a layer (layer=...) that "
            "every example passes, of a width that does not depend on it."
        )
    features = torch.cat([values.cpu() for values, _ in parts])
    if not bool(features.isfinite().all()):
        first = int((~features.isfinite()).any(1).nonzero()[0])
        raise NonFiniteError(
            f"The features of example {first} are not finite. Look at its inputs, or name another "
            "layer."
        )
    return features
