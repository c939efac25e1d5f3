"""Weights that others saved: state dicts and Lightning's checkpoints. Nothing is unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.runtime.compiled import plain_name


@dataclass(frozen=True, repr=False)
class SavedWeights:
    """What a file holds of a training.

    Attributes:
        path: of the file, or what stands for it.
        tensors: the module's state dict, by plain name.
        step: optimizer steps before it; None if the file does not say.
        epoch: of that step, likewise.
        groups: the optimizer's parameter groups with their settings; none where there are several
            optimizers or the file does not say.
        run_ids: of the recorded runs that it was saved in.
    """

    path: str
    tensors: Mapping[str, Tensor]
    step: int | None = None
    epoch: int | None = None
    groups: Sequence[Mapping[str, Any]] = ()
    run_ids: tuple[str, ...] = field(default=())


def read_weights(path: str | PathLike[str]) -> SavedWeights:
    """The weights in a file: a state dict, or a checkpoint of Lightning.

    Raises:
        FileNotFoundError: there is no such file.
        TrajectoryFormatError: it is damaged, or holds objects that would have to be unpickled.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {file}: expected a file of weights.")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrajectoryFormatError(
            f"{file} holds objects besides tensors and plain values, which would have to be "
            f"unpickled, and unpickling can run any code: {str(error).splitlines()[0]} If you "
            "trust it, load it yourself and save or pass its state dict: "
            "torch.load(file, weights_only=False)['state_dict']."
        ) from error
    except (RuntimeError, EOFError, BadZipFile, ValueError, KeyError, IndexError) as error:
        raise TrajectoryFormatError(f"{file} is no file of weights, or damaged: {error}") from error
    return weights_of(content, str(file))


def weights_of(content: object, path: str) -> SavedWeights:
    """The weights in what was loaded.

    Raises:
        TrajectoryFormatError: it is neither a state dict nor a checkpoint of Lightning.
    """
    if not isinstance(content, Mapping):
        raise _no_weights(path, f"a {type(content).__name__}")
    inner = content.get("state_dict")
    if not isinstance(inner, Mapping):
        return SavedWeights(path, _tensors(content, path))
    optimizers, loops = content.get("optimizer_states") or [], content.get("callbacks") or {}
    groups: Any = ()
    if len(optimizers) == 1 and isinstance(optimizers[0], Mapping):
        groups = optimizers[0].get("param_groups", ())
    run_ids = [
        str(state["run_id"])
        for state in (loops.values() if isinstance(loops, Mapping) else ())
        if isinstance(state, Mapping) and {"run_id", "rows"} <= state.keys()
    ]
    step, epoch = content.get("global_step"), content.get("epoch")
    return SavedWeights(
        path,
        _tensors(inner, path),
        step if isinstance(step, int) else None,
        epoch if isinstance(epoch, int) else None,
        groups,
        tuple(run_ids),
    )


def _tensors(content: Mapping[Any, object], path: str) -> dict[str, Tensor]:
    tensors = {
        plain_name(name): value.detach()
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise _no_weights(path, f"a dictionary with the keys {', '.join(map(str, content))[:80]}")
    return tensors


def _no_weights(path: str, got: str) -> TrajectoryFormatError:
    return TrajectoryFormatError(
        f"{path} holds no weights: expected a state dict (names and tensors) or a checkpoint of "
        f"Lightning (with a state_dict), got {got}."
    )
