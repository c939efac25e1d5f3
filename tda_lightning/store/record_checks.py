"""Checks on the records of a trajectory before anything is computed with them.

HDF5's checksums detect accidents. A file that was made or changed by other means may be intact and
still hold what no run can: an example beyond the end of the data set, offsets that run backwards, a
shape of a trillion numbers. Estimators index with these records and do not check again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.records.trajectory import Facts
from tda_lightning.store.hdf5 import is_dtype
from tda_lightning.store.step_arrays import StepArrays

_MOST = 1 << 62  # numbers of a tensor, examples of a data set
_GROUPS = 1 << 16


def require_facts(text: Any) -> None:
    """Check the JSON of a trajectory's facts.

    Raises:
        ValueError, TypeError, LookupError: it is not what a recorder writes.
    """
    for name, fact in text["parameters"].items():
        shape, dtype = fact["shape"], fact["dtype"]
        whole = isinstance(shape, list) and all(_is_count(length) for length in shape)
        if not whole or math.prod(shape) > _MOST:
            raise ValueError(f"parameter {name!r} has shape {str(shape)[:100]}")
        if not is_dtype(dtype):
            raise ValueError(f"parameter {name!r} has dtype {str(dtype)[:100]!r}")
        if not _is_count(fact["group"], _GROUPS):
            raise ValueError(f"parameter {name!r} is in group {str(fact['group'])[:100]}")
    if not isinstance(text["optimizer"], str) or not isinstance(text["settings"], dict):
        raise TypeError("optimizer is no text, or settings are no JSON object")
    count, prints = text["num_examples"], text["fingerprint"]
    if count is not None and not _is_count(count):
        raise ValueError(f"num_examples is {str(count)[:100]}")
    if prints is not None:
        _require_fingerprint(prints, count)
    _require_stages(text.get("stages", []), set(text["parameters"]))
    base = text.get("base", {})
    if not isinstance(base, dict) or not all(isinstance(value, str) for value in base.values()):
        raise TypeError("base is no JSON object of digests")
    if both := set(base) & set(text["parameters"]):
        raise ValueError(f"{min(both)!r} is trained, and among the frozen base")


def _require_stages(stages: object, known: set[str]) -> None:
    if not isinstance(stages, list):
        raise TypeError("stages are no list")
    previous = -1
    for stage in stages:
        start, parameters = stage["start"], stage["parameters"]
        if not _is_count(start) or start <= previous or (previous < 0 < start):
            raise ValueError(f"a stage starts at {str(start)[:100]}")
        if not _is_names(parameters) or not set(parameters) <= known:
            raise ValueError(f"a stage trains {str(parameters)[:100]}, not all of them parameters")
        previous = start


def require_statistics(blocks: object) -> None:
    """Check the JSON of a file of statistics: {block: {parameters, shape}}.

    Raises:
        ValueError, TypeError, LookupError: it is not what a recorder writes.
    """
    if not isinstance(blocks, dict):
        raise TypeError("blocks are no JSON object")
    for name, block in blocks.items():
        if set(block) != {"parameters", "shape"}:
            raise ValueError(f"block {name[:100]!r} has {str(sorted(block))[:100]}")
        shape, parameters = block["shape"], block["parameters"]
        if not _is_names(parameters) or not parameters:
            raise ValueError(f"block {name[:100]!r} is of {str(parameters)[:100]}")
        whole = isinstance(shape, list) and len(shape) == 3
        if not whole or not all(_is_count(n) and n > 0 for n in shape) or math.prod(shape) > _MOST:
            raise ValueError(f"block {name[:100]!r} has shape {str(shape)[:100]}")
    owned = [name for block in blocks.values() for name in block["parameters"]]
    if len(owned) != len(set(owned)):
        raise ValueError("a parameter is in two blocks")


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _require_fingerprint(prints: Mapping[str, object], count: int | None) -> None:
    length = _position(prints["length"])
    if count is not None and length != count:
        raise ValueError(f"a fingerprint of {length} examples, and {count} examples")
    for key, value in prints.items():
        if not isinstance(value, str) or (key != "length" and _position(key) >= length):
            raise ValueError(f"a fingerprint of example {key[:100]!r} of {length}")


def _position(text: object) -> int:
    if not isinstance(text, str) or not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise ValueError(f"{str(text)[:100]!r} is no number of an example")
    return int(text)


def _is_count(value: object, most: int = _MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def require_values(steps: StepArrays) -> None:
    """Check single values of steps whose shapes are right.

    The loss and the gradient's norm of a run that diverged may well be NaN.

    Raises:
        ValueError: a value is out of its range.
    """
    if len(steps) and not steps.learning_rate.shape[1]:
        raise ValueError("steps without parameter groups")
    for name, values in {"learning_rate": steps.learning_rate, **steps.hyperparameters}.items():
        if not bool(np.isfinite(values).all()):
            raise ValueError(f"{name} is not finite")
    # A run that diverged has NaN here too, but no negative length.
    if bool((steps.clipping < 0).any()):
        raise ValueError("a clipping factor below 0")
    if bool((steps.epoch < 0).any()) or bool((steps.accumulation < 1).any()):
        raise ValueError("an epoch below 0, or an accumulation below 1")


def require_fitting(path: Path, blocks: Sequence[StepArrays], facts: Facts) -> None:
    """Check that files of steps fit each other and the facts.

    Raises:
        TrajectoryFormatError: they do not.
    """
    group = max((fact.group for fact in facts.parameters.values()), default=0)
    for block in blocks:
        names, expected = set(block.hyperparameters), set(blocks[0].hyperparameters)
        if names != expected:
            _refuse(path, f"the hyper-parameters {sorted(expected)}", sorted(names))
        last = int(block.examples.max()) if len(block.examples) else 0
        if facts.num_examples is not None and last >= facts.num_examples:
            _refuse(path, f"examples of {facts.num_examples}", f"example {last}")
    columns = max((block.learning_rate.shape[1] for block in blocks), default=group + 1)
    if columns <= group:
        _refuse(path, f"{group + 1} parameter groups or more", columns)


def _refuse(path: Path, expected: str, got: object) -> None:
    raise TrajectoryFormatError(
        f"{path} does not belong to the facts beside it: expected {expected}, got {got}. "
        "Restore the files from a copy, or record again."
    )
