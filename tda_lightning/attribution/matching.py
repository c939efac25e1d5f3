"""Whether a module and a data set are those of a recorded run."""

from __future__ import annotations

from torch import nn

from tda_lightning.records.data_module import require_data_module
from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.compiled import plain_parameters
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.store import compare_fingerprints
from tda_lightning.tasks import AttributionTask


def require_same_data(trajectory: Trajectory, source: ExampleSource) -> None:
    """Refuse a training set of another length or fingerprint, or without the data module whose
    hooks its batches went through."""
    recorded, dataset = trajectory.facts, source.dataset
    require_data_module(recorded, source)
    if recorded.num_examples is not None and len(dataset) != recorded.num_examples:
        raise TrajectoryMismatchError(
            f"The training set is not the recorded one: expected {recorded.num_examples} "
            f"examples, got {len(dataset)}. Pass the training set of the recorded run, in its "
            "order."
        )
    compare_fingerprints(recorded.fingerprint, dataset)


def require_same_parameters(module: nn.Module, trajectory: Trajectory) -> None:
    """Refuse a module that does not hold every recorded parameter in its recorded shape."""
    own = {name: tuple(parameter.shape) for name, parameter in plain_parameters(module).items()}
    recorded = {name: fact.shape for name, fact in trajectory.facts.parameters.items()}
    missing = [name for name in recorded if name not in own]
    reshaped = [
        f"{name} ({list(shape)} recorded, {list(own[name])} in the module)"
        for name, shape in recorded.items()
        if name in own and own[name] != tuple(shape)
    ]
    if missing or reshaped:
        parts = []
        if missing:
            parts.append(f"recorded but not in the module: {', '.join(missing)}")
        if reshaped:
            parts.append(f"of another shape: {', '.join(reshaped)}")
        raise TrajectoryMismatchError(
            f"The module's parameters are not the recorded ones: {'; '.join(parts)}. Build the "
            "module as it was trained."
        )


def attributed_parameters(trajectory: Trajectory, task: AttributionTask) -> list[str]:
    """Names of the trained parameters that the task takes into account."""
    names = list(trajectory.facts.parameters)
    if task.layers is None:
        return names
    kept = [
        name
        for name in names
        if any(name == layer or name.startswith(f"{layer}.") for layer in task.layers)
    ]
    if not kept:
        raise ValueError(
            f"task.layers={list(task.layers)} selects no trained parameter. Trained parameters: "
            f"{', '.join(names)}."
        )
    return kept
