"""The file of a ground truth; :mod:`tda_lightning.store.layout` describes it."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from tda_lightning.records.ground_truth import PROTOCOLS, GroundTruth
from tda_lightning.store.atomic_write import make_folder
from tda_lightning.store.hdf5 import get_array, get_json, put_array, put_json, reading, writing
from tda_lightning.store.layout import GROUND_TRUTH
from tda_lightning.store.untrusted import get_text, has, put_text

_ARRAYS = {
    "subsets": "?",
    "seeds": "<i8",
    "done": "?",
    "outcomes": "<f8",
    "seconds": "<f8",
    "baseline": "<f8",
    "classes": "<i8",
}
_OPTIONAL = "classes"


def write_ground_truth(truth: GroundTruth, path: str | os.PathLike[str]) -> None:
    """Write ``truth`` at ``path``, replacing any file there.

    Raises:
        OSError: the disk is full, or the folder may not be written to.
    """
    path = Path(path)
    make_folder(path.parent)
    with writing(path, GROUND_TRUTH) as file:
        put_text(file, "protocol", truth.protocol)
        for name, dtype in _ARRAYS.items():
            tensor = getattr(truth, name)
            if tensor is not None:
                put_array(file, name, tensor.cpu().numpy().astype(dtype), compress=True)
        put_json(file, "configuration", dict(truth.configuration))
        put_json(file, "made_by", dict(truth.made_by))


def read_ground_truth(path: str | os.PathLike[str]) -> GroundTruth:
    """The ground truth at ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        TrajectoryFormatError: it is no ground truth, damaged, or of a newer format version.
    """
    with reading(Path(path), GROUND_TRUTH) as file:
        protocol = get_text(file.attrs, "protocol")
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol {protocol!r}")
        tensors = {
            name: _tensor(file, name, dtype)
            for name, dtype in _ARRAYS.items()
            if name != _OPTIONAL or has(file, name)
        }
        return GroundTruth(
            protocol=protocol,
            configuration=_object(file, "configuration"),
            made_by=_object(file, "made_by"),
            **tensors,
        )


def _tensor(file: h5py.File, name: str, dtype: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(get_array(file, name, dtype)))


def _object(file: h5py.File, name: str) -> dict[str, object]:
    value = get_json(file, name)
    if not isinstance(value, dict):
        raise TypeError(f"its {name} is no JSON object")
    return value
