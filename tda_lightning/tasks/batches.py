"""Taking batches apart: where the target is, how many examples there are, what a model returned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tda_lightning.runtime.layouts import cut, first_axis, stacked, unstacked
from tda_lightning.runtime.origins import origin_of, rule_of
from tda_lightning.runtime.structures import parts, tensors, with_parts
from tda_lightning.tasks.example_seeds import active_examples, active_seed, seeded_examples
from tda_lightning.tasks.node_batch import NodeBatch

Result = TypeVar("Result")
Batch: TypeAlias = Any  # what the loader gives, of any structure
Inputs: TypeAlias = Sequence[object] | Mapping[str, object]  # positional, or by name

TARGET_KEYS = ("label", "labels", "y", "target", "targets")


def split_target(batch: Batch, target: str | None = None) -> tuple[Inputs, Tensor]:
    """Inputs and target of a batch.

    Args:
        batch: a tuple or list with the target last, or a dictionary; a dataclass counts as one.
        target: the dictionary's key of the target; by default the first of ``TARGET_KEYS``.

    Returns:
        The inputs: a list of positional ones, or a dictionary; and the target.
    """
    if is_dataclass(batch):
        batch = parts(batch)
    if isinstance(batch, Mapping):
        key = target or next((name for name in TARGET_KEYS if name in batch), None)
        if key is None or key not in batch:
            wanted = repr(target) if target else " or ".join(map(repr, TARGET_KEYS))
            raise ValueError(
                f"Expected a batch with the target under {wanted}, got the keys {list(batch)}. "
                "Name the key with target=, or override forward(module, batch) of the task."
            )
        inputs: Inputs = {name: value for name, value in batch.items() if name != key}
        labels = batch[key]
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        inputs, labels = list(batch[:-1]), batch[-1]
    else:
        raise ValueError(
            f"Expected a batch (inputs, target) or a dictionary, got {_describe(batch)}. "
            "Override forward(module, batch) of the task for other batches."
        )
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"Expected the target to be a tensor, got {_describe(labels)}. "
            "Override forward(module, batch) of the task for other targets."
        )
    return inputs, labels


def with_labels(batch: Batch, labels: Mapping[int, object], target: str | None = None) -> Batch:
    """A copy of the batch whose target is changed at some positions.

    Args:
        batch: a tuple or list with the target last, or a dictionary, as in :func:`split_target`.
        labels: new label by position in the batch.
        target: the dictionary's key of the target.
    """
    _, present = split_target(batch, target)
    changed = present.clone()
    for position, label in labels.items():
        given = torch.as_tensor(label, dtype=present.dtype, device=present.device)
        if given.shape != present.shape[1:]:
            raise ValueError(
                f"A new label has the shape {list(given.shape)}, expected that of the labels in "
                f"the batch, {list(present.shape[1:])}."
            )
        changed[position] = given
    if isinstance(batch, Mapping) or is_dataclass(batch):
        (key,) = [name for name, value in (parts(batch) or {}).items() if value is present]
        return with_parts(batch, {**(parts(batch) or {}), key: changed})
    return _rebuilt(batch, [*batch[:-1], changed])


def call(module: nn.Module, inputs: Inputs) -> Tensor:
    """Run ``module`` on inputs from :func:`split_target`; the output is unwrapped.

    A dictionary of several entries is passed by keyword, a single entry positionally. A single
    nested entry is unpacked when ``forward`` needs more than one argument.
    """
    if isinstance(inputs, Mapping):
        if len(inputs) != 1:
            return unwrap(module(**inputs))
        inputs = list(inputs.values())
    if len(inputs) == 1 and required_arguments(module) > 1:
        (only,) = inputs
        if isinstance(only, Mapping):
            return unwrap(module(**only))
        if isinstance(only, (tuple, list)):
            inputs = only
    return unwrap(module(*inputs))


def unwrap(outputs: object) -> Tensor:
    """The tensor in a model's output: itself, ``.logits``, ``["logits"]``, or the first entry."""
    while not isinstance(outputs, Tensor):
        if hasattr(outputs, "logits"):
            outputs = outputs.logits
        elif isinstance(outputs, Mapping) and "logits" in outputs:
            outputs = outputs["logits"]
        elif isinstance(outputs, (tuple, list)) and outputs:
            outputs = outputs[0]
        else:
            raise ValueError(
                "Expected the module to return a tensor, an object with .logits, a dictionary "
                f"with 'logits' or a tuple, got {_describe(outputs)}. "
                "Override forward(module, batch) of the task."
            )
    return outputs


def num_examples(batch: Batch) -> int:
    """Number of examples: the nodes that are meant, those of the active seeds, those that the batch
    was read with, or else the length of its first tensor's first axis."""
    if isinstance(batch, NodeBatch):
        return len(batch)
    examples = active_examples()
    if examples is not None:
        return len(examples)
    origin = origin_of(batch)
    if origin is not None:
        return len(origin.indices)
    tensor = next((tensor for tensor in tensors(batch) if tensor.dim()), None)
    if tensor is None:
        raise ValueError(
            f"Expected a batch that holds a tensor [batch, ...], got {_describe(batch)}."
        )
    return tensor.shape[0]


def take(batch: Batch, index: int, size: int) -> Batch:
    """A batch of one: example ``index`` of a batch of ``size``.

    By the task's own ``example``, where it overrides it; by slices, where they are what the data
    set's loader makes of that example alone; and otherwise by reading the example again. A batch
    whose data set is not known is cut along first axes.

    Raises:
        CannotCut: it cannot be cut in any of these ways.
    """
    if size == 1:
        return batch
    if isinstance(batch, NodeBatch):
        return batch.take(index)
    origin = origin_of(batch)
    if origin is not None:
        return origin.single(batch, index)
    return cut(first_axis(batch, size), batch, index, size)


def each_alone(batch: Batch, work: Callable[[Batch], Result]) -> list[Result]:
    """``work`` of each example in a batch of one, with the noise that it has in the batch."""
    count = num_examples(batch)
    examples, seed = active_examples(), active_seed()
    if examples is None:
        examples = torch.arange(count)
    results = []
    for number in range(count):
        with seeded_examples(seed, examples[number : number + 1]):
            results.append(work(take(batch, number, count)))
    return results


def cut_or_read(batch: Batch, index: int) -> Batch:
    """:func:`take` without the task's own way."""
    size, origin = num_examples(batch), origin_of(batch)
    if size == 1 or origin is None:
        return take(batch, index, size)
    return origin.cut(batch, index)


def apart(batch: Batch, size: int) -> tuple[list[Any], list[int | None], Callable[..., Batch]]:
    """A batch as slices for ``torch.func.vmap``.

    Returns:
        Its leaves; the axis of the examples in each, None where they share it; and what makes a
        batch of one of the leaves without that axis.

    Raises:
        CannotCut: its examples are no slices of tensors.
    """
    rule = rule_of(batch, size)
    leaves = stacked(rule, batch, size)
    parts, axes = [part for part, _ in leaves], [axis for _, axis in leaves]
    return parts, axes, lambda own: unstacked(rule, batch, iter(own))


def _rebuilt(batch: Batch, values: list[object]) -> Batch:
    """``values`` in a tuple, named tuple or list like ``batch``."""
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)


def required_arguments(module: nn.Module) -> int:
    """How many arguments its ``forward`` must be given."""
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(
        parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        for parameter in parameters
    )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dictionary with keys {list(value)}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
