"""Whether a module and a data set are those of a recorded run."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from tda_lightning.records.data_module import require_data_module
from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.compiled import plain_buffers, plain_parameters
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.tokenizers import tokenizer_digests
from tda_lightning.store import compare_collation, compare_fingerprints
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
    if recorded.num_examples is None:
        _require_whole_stream(trajectory, len(dataset))
    compare_fingerprints(recorded.fingerprint, dataset)
    compare_collation(recorded.settings.get("collation"), source)
    known = recorded.settings.get("tokenizers")
    given = tokenizer_digests(dataset, source.collate)
    if known and given and set(known) != set(given):
        raise TrajectoryMismatchError(
            "The tokenizer of the training set or its collator is not the recorded one: its "
            f"vocabulary or special tokens differ (fingerprints {', '.join(known)} recorded, "
            f"{', '.join(given)} given). Load the tokenizer that the run was trained with."
        )


def _require_whole_stream(trajectory: Trajectory, given: int) -> None:
    """Refuse a copy of a stream that lacks examples which its batches held."""
    used = trajectory.steps.examples
    if len(used) and int(used.max()) >= given:
        raise TrajectoryMismatchError(
            f"The training set has {given} examples, and the stream that the run was trained on "
            f"gave example {int(used.max())}. Pass a map-style copy of all of it, in the order of "
            "the positions that its batches held."
        )


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
            "module as it was trained"
            + (
                ", with its adapters apart from the base (not merged by merge_and_unload)."
                if any("lora_" in name for name in missing)
                else "."
            )
        )


def require_same_base(module: nn.Module, trajectory: Trajectory) -> None:
    """Refuse a module whose frozen weights are not those that the run was trained on.

    Checkpoints of a run that trained little on a large base hold no copy of it.
    """
    base = trajectory.facts.base
    own = {**plain_parameters(module), **plain_buffers(module)}
    missing = [name for name in base if name not in own]
    known = _digests.setdefault(module, {})
    differing = []
    for name, recorded in base.items():
        if name in missing:
            continue
        tensor = own[name]
        # Members of an ensemble share one module: its base is read once.
        state = (tensor.data_ptr(), tensor._version, tensor.dtype)
        if name not in known or known[name][0] != state:
            known[name] = (state, digest(tensor.detach()))
        if known[name][1] != recorded:
            differing.append(name)
    if missing or differing:
        parts = [
            f"{len(names)} of {len(base)} {what}, as {', '.join(names[:3])}"
            for names, what in ((missing, "are not in the module"), (differing, "differ"))
            if names
        ]
        raise TrajectoryMismatchError(
            "The module's frozen base weights are not those that the run was trained on: "
            f"{' and '.join(parts)}. The trajectory holds what was trained alone and knows the "
            "base by its fingerprint. Build the module on the very base weights of the training, "
            "in the same precision, with no adapter merged into them (merge_adapter, "
            "merge_and_unload)."
        )


# Of base weights, by module and name: where a tensor was when it was read, and its digest.
_digests: WeakKeyDictionary[nn.Module, dict[str, tuple[object, str]]] = WeakKeyDictionary()


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
