"""Batches of any structure, opened and put together again: mappings, sequences, dataclasses and
plain objects are containers of named parts; everything else is a leaf."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_LEAVES = (Tensor, np.ndarray, np.generic, PackedSequence, nn.Module, torch.Generator)


def parts(thing: object) -> dict[object, Any] | None:
    """The parts of a container by their keys; None for a leaf."""
    if isinstance(thing, (*_LEAVES, str, bytes, type)):
        return None
    if isinstance(thing, Mapping):
        return dict(thing.items())
    if isinstance(thing, (list, tuple)):
        return dict(enumerate(thing))
    if is_dataclass(thing):
        return {field.name: getattr(thing, field.name) for field in fields(thing)}
    if callable(thing) or type(thing).__module__ == "builtins":
        return None
    own = getattr(thing, "__dict__", None)
    return dict(own) if own and not hasattr(thing, "__slots__") else None


def with_parts(thing: Any, values: Mapping[Any, Any]) -> Any:
    """A container like ``thing`` with other values under the same keys; ``thing`` stays as it is.

    Raises:
        TypeError: it is a mapping that takes no new values.
    """
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*values.values())
    if isinstance(thing, (list, tuple)):
        return type(thing)(list(values.values()))
    if isinstance(thing, Mapping):
        if not isinstance(thing, MutableMapping):
            raise TypeError(f"{type(thing).__name__} is a mapping that takes no new values.")
        changed = copy.copy(thing)
        for key, value in values.items():
            changed[key] = value
        return changed
    changed = copy.copy(thing)
    for name, value in values.items():
        object.__setattr__(changed, str(name), value)  # a dataclass may be frozen
    return changed


def mapped(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with ``function`` applied to each of its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, PackedSequence):
        return batch._replace(data=function(batch.data))
    inside = parts(batch)
    if not inside:
        return batch
    changed = {key: mapped(function, part) for key, part in inside.items()}
    same = all(changed[key] is part for key, part in inside.items())
    return batch if same else with_parts(batch, changed)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch on ``device``, as Lightning moves one: by ``.to`` where a part has it. To a GPU the
    copy runs beside its work, from page-locked memory."""
    if type(batch) is Tensor and device.type == "cuda" and batch.device.type == "cpu":
        if batch.layout is torch.strided and not batch.is_pinned():
            batch = batch.pin_memory()
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to") and callable(batch.to) and not isinstance(batch, type):
        there = batch.to(device)
        return batch if there is None else there
    inside = parts(batch)
    if not inside:
        return batch
    changed = {key: moved(part, device) for key, part in inside.items()}
    same = all(changed[key] is part for key, part in inside.items())
    return batch if same else with_parts(batch, changed)


def leaves(batch: object) -> Iterator[object]:
    """The leaves of a batch, in the order of its parts."""
    inside = parts(batch)
    if inside is None:
        yield batch
        return
    for part in inside.values():
        yield from leaves(part)


def tensors(batch: object) -> Iterator[Tensor]:
    """The tensors of a batch."""
    for leaf in leaves(batch):
        if isinstance(leaf, PackedSequence):
            yield leaf.data
        elif isinstance(leaf, Tensor):
            yield leaf


def same(one: object, other: object) -> bool:
    """Whether two things have the same structure and values, up to rounding."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return close(one, other)
    if isinstance(one, (np.ndarray, np.generic)):
        return same_arrays(one, other)
    if isinstance(one, PackedSequence):
        return all(map(same, one, other))  # type: ignore[call-overload]
    inside, there = parts(one), parts(other)
    if inside is None or there is None:
        try:
            return one is other or bool(one == other)
        except (TypeError, ValueError, RuntimeError):
            return False
    return inside.keys() == there.keys() and all(same(inside[key], there[key]) for key in inside)


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in shape, type and, up to rounding, in value."""
    if one.is_nested or other.is_nested:
        both = one.is_nested and other.is_nested and one.size(0) == other.size(0)
        return both and all(map(close, one.unbind(), other.unbind()))
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.layout != torch.strided:
        return close(one.to_dense(), other.to_dense())
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    return torch.allclose(one, other, equal_nan=True)


def same_arrays(one: Any, other: Any) -> bool:
    """:func:`close` for arrays of NumPy, whatever their type."""
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind in "fc":
        return bool(np.allclose(one, other, equal_nan=True))
    return bool(np.array_equal(one, other))
