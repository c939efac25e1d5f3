"""The file of a ground truth: one HDF5 file, readable with h5py alone.

Layout, format version 1::

    /                       attributes: format = "tda-lightning ground truth", format_version = 1,
                            protocol = "single_run", "algorithm" or "pbrf"
    /subsets                bool [subset, train], True for the examples a subset keeps
    /seeds                  int64 [subset, seed], of each retraining; -1 for the recorded one
    /done                   bool [subset, seed], whether the retraining was made
    /outcomes               float64 [subset, seed, query], measurements after it; 0 where not done
    /seconds                float64 [subset, seed], how long it took
    /baseline               float64 [query], measurements of the recorded run's last checkpoint
    /configuration          text, a JSON object: digests and settings that determine the outcomes
    /made_by                text, a JSON object: command and versions
    /classes                int64 [subset, seed, query], only where somebody asked: what the model
                            then predicts of the query; 0 where not done

Arrays carry checksums. The file is written anew, aside and renamed, after every retraining: one
that is interrupted leaves all the earlier ones.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.records.ground_truth import PROTOCOLS, GroundTruth
from tda_lightning.store.atomic_write import AsideFile, make_folder, sync_folder
from tda_lightning.store.hdf5 import get_array, get_json, put_array, put_json
from tda_lightning.store.untrusted import (
    DAMAGE,
    get_integer,
    get_text,
    has,
    put_text,
    require_regular,
)

FORMAT = "tda-lightning ground truth"
FORMAT_VERSION = 1
_ARRAYS = {
    "subsets": "?",
    "seeds": "<i8",
    "done": "?",
    "outcomes": "<f8",
    "seconds": "<f8",
    "baseline": "<f8",
}
_CLASSES = ("classes", "<i8")
_OBJECTS = ("configuration", "made_by")


def write_ground_truth(truth: GroundTruth, path: str | os.PathLike[str]) -> None:
    """Write ``truth`` at ``path``, in place of what is there.

    Raises:
        OSError: the disk is full, or the folder may not be written to.
    """
    path = Path(path)
    make_folder(path.parent)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with AsideFile(aside) as target:
            try:
                with h5py.File(target, "w", libver=("v110", "v110")) as file:
                    _write(file, truth)
            except Exception:
                target.check()  # what HDF5 makes of a dropped write says nothing to anybody
                raise
            target.finish()
        os.replace(aside, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def _write(file: h5py.File, truth: GroundTruth) -> None:
    put_text(file.attrs, "format", FORMAT)
    file.attrs["format_version"] = FORMAT_VERSION
    put_text(file.attrs, "protocol", truth.protocol)
    arrays = _ARRAYS if truth.classes is None else dict([*_ARRAYS.items(), _CLASSES])
    for name, kind in arrays.items():
        array = getattr(truth, name).cpu().numpy().astype(kind)
        put_array(file, name, array, compress=True)
    for name in _OBJECTS:
        put_json(file, name, dict(getattr(truth, name)))


def read_ground_truth(path: str | os.PathLike[str]) -> GroundTruth:
    """The ground truth at ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        TrajectoryFormatError: it is no ground truth, damaged, or of a newer format version.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no ground truth at {path}.")
    require_regular(path)
    try:
        with h5py.File(path, "r") as file:
            _require_format(path, file)
            protocol = get_text(file.attrs, "protocol")
            if protocol not in PROTOCOLS:
                raise ValueError(f"protocol {protocol!r}")
            arrays = {name: _tensor(file, name, kind) for name, kind in _ARRAYS.items()}
            if has(file, _CLASSES[0]):
                arrays["classes"] = _tensor(file, *_CLASSES)
            return GroundTruth(
                protocol=protocol,  # type: ignore[arg-type]
                **arrays,  # type: ignore[arg-type]
                configuration=_object(file, "configuration"),
                made_by=_object(file, "made_by"),
            )
    except (TrajectoryFormatError, PermissionError):
        raise
    except DAMAGE as error:
        raise TrajectoryFormatError(
            f"{path} is damaged or no ground truth ({error}). Restore it from a copy, or delete "
            "it to retrain."
        ) from error


def _tensor(file: h5py.File, name: str, kind: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(get_array(file, name, kind)))


def _object(file: h5py.File, name: str) -> dict[str, Any]:
    found = get_json(file, name)
    if not isinstance(found, dict):
        raise TypeError(f"its {name} is no JSON object")
    return found


def _require_format(path: Path, file: h5py.File) -> None:
    found = get_text(file.attrs, "format") if "format" in file.attrs else None
    if found != FORMAT:
        raise TrajectoryFormatError(
            f"{path} is an HDF5 file but holds no ground truth: expected format = {FORMAT!r}, got "
            f"{found!r}. Give a file that tda evaluate wrote."
        )
    version = get_integer(file.attrs, "format_version")
    if version < 1:
        raise ValueError(f"format version {version}")
    if version > FORMAT_VERSION:
        raise TrajectoryFormatError(
            f"{path} has ground truth format version {version}; this release reads up to "
            f"{FORMAT_VERSION}. Upgrade tda-lightning."
        )
