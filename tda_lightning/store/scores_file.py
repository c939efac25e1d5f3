"""The file of scores; :mod:`tda_lightning.store.layout` describes it."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import h5py
import numpy as np
import torch
from torch import Tensor

from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.score_checks import require_finite, require_scored
from tda_lightning.records.score_sinks import MemorySink
from tda_lightning.records.scores import Scores
from tda_lightning.store.atomic_write import make_folder, part_path, publish, replacing
from tda_lightning.store.hdf5 import damaged, hdf5_file, put_header, reading
from tda_lightning.store.layout import SCORES
from tda_lightning.store.untrusted import DAMAGE, from_json, has, member, own_dataset, to_json

_ARRAYS = (
    *("values", "by_segment", "self_influence", "by_token", "candidates", "members"),
    *("by_query_token", "direct", "by_timestep"),
)
# Version 2 is for candidates only: earlier releases read version 1, and know no missing scores.
_WITH_CANDIDATES, _WITHOUT_CANDIDATES = 2, 1
# What has no score where an example is no candidate.
_OF_CANDIDATES = ("values", "by_token", "by_query_token")
# Provenance entries with one item per query, which are cut along with the rows.
_PER_QUERY = ("predictions", "measurements", "query_indices")


def write_scores(scores: Scores, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Save ``scores`` at ``path``; see :meth:`tda_lightning.Scores.save`."""
    path = Path(path)
    provenance = _provenance_json(scores.provenance)
    _numpy_dtype(scores.values.dtype)
    require_free(path, overwrite)
    make_folder(path.parent)
    with replacing(path) as part:
        with hdf5_file(part, "w") as file:
            put_header(file, SCORES, _WITHOUT_CANDIDATES)
            _complete(file, scores, provenance)
        require_free(path, overwrite)


def replace_provenance(path: str | os.PathLike[str], provenance: Mapping[str, object]) -> None:
    """Give the file at ``path`` another provenance; its numbers and their checksums stay.

    Raises:
        OSError: the disk has no room for a copy, which then takes the file's place.
        TrajectoryFormatError: the file is damaged or holds no scores.
    """
    path, text = Path(path), _provenance_json(provenance)
    with reading(path, SCORES):
        pass  # what it is, is checked before it is copied
    try:
        with replacing(path) as part:
            shutil.copyfile(path, part)
            with hdf5_file(part, "r+") as file:
                for name in ("provenance", "checksums/provenance"):
                    del file[name]
                _put_provenance(file, text)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise damaged(path, SCORES, error) from error


def read_scores(
    path: str | os.PathLike[str], queries: slice | None = None, mapped: bool = False
) -> Scores:
    """Load scores from ``path``; see :meth:`tda_lightning.Scores.load`."""
    path = Path(path)
    rows = slice(None) if queries is None else queries
    if rows.step is not None and rows.step < 1:
        raise ValueError(f"queries must be a slice with a positive step, got {rows}.")
    with reading(path, SCORES) as file:
        provenance = _read_provenance(path, file)
        if queries is not None:
            count = len(own_dataset(file, "values"))
            provenance.setdefault("query_indices", list(range(count)))
            for name in _PER_QUERY:
                if name in provenance:
                    provenance[name] = provenance[name][rows]
        values = _read(path, file, "values", (rows,), mapped)
        assert values is not None
        return Scores(
            values,
            by_segment=_read(path, file, "by_segment", (slice(None), rows), mapped),
            self_influence=_read(path, file, "self_influence", (), False),
            provenance=cast(Provenance, provenance),
            by_token=_read(path, file, "by_token", (rows,), mapped),
            candidates=_read(path, file, "candidates", (rows,), False),
            members=_read(path, file, "members", (slice(None), rows), mapped),
            by_query_token=_read(path, file, "by_query_token", (rows,), mapped),
            direct=_read(path, file, "direct", (rows,), mapped),
            by_timestep=_read(path, file, "by_timestep", (slice(None), rows), mapped),
        )


def _complete(file: h5py.File, scores: Scores | MemorySink, provenance: str) -> None:
    """Write what ``file`` does not hold yet, and the checksums of everything."""
    dtype = scores.values.dtype
    for name in _ARRAYS:
        tensor: Tensor | None = getattr(scores, name)
        if tensor is None:
            continue
        tensor = tensor.detach().cpu() if name == "candidates" else tensor.detach().to("cpu", dtype)
        array = tensor.contiguous().numpy()
        if name not in file:
            file[name] = array
        file[f"checksums/{name}"] = _row_checksums(array)
    if scores.candidates is not None:
        file.attrs[SCORES.version_attribute] = _WITH_CANDIDATES
    _put_provenance(file, provenance)


def _put_provenance(file: h5py.File, text: str) -> None:
    file["provenance"] = np.bytes_(text.encode())
    file["checksums/provenance"] = np.uint32(zlib.crc32(text.encode()))


def _read_provenance(path: Path, file: h5py.File) -> dict[str, Any]:
    dataset = own_dataset(file, "provenance")
    if dataset.dtype.kind != "S" or dataset.shape != ():
        raise TypeError("its provenance is no text")
    text = bytes(dataset[()])
    _require_checksum(path, "provenance", zlib.crc32(text), file)
    provenance = from_json(text)
    if not isinstance(provenance, dict):
        raise TypeError("its provenance is no JSON object")
    return provenance


def _read(
    path: Path, file: h5py.File, name: str, rows: tuple[slice, ...], mapped: bool
) -> Tensor | None:
    """Some rows of an array, or None where it is not there."""
    if name != "values" and not has(file, name):
        return None
    dataset = own_dataset(file, name)
    if name == "candidates":
        fits = dataset.dtype == "<i8" and dataset.ndim == 2
    else:
        fits = dataset.dtype in ("<f4", "<f8") and dataset.dtype == file["values"].dtype
    if not fits:
        raise TypeError(f"{name!r} holds {dataset.dtype} of shape {list(dataset.shape)}")
    if mapped:
        return _mapped(path, dataset, "c")[rows]
    array = dataset[rows]
    _require_checksum(path, name, _row_checksums(array), file, rows)
    # Scores check the values of candidates themselves.
    unscored = name in _OF_CANDIDATES and has(file, "candidates")
    if not np.isfinite(array).all() and not unscored:
        raise ValueError(f"{name!r} is not finite")
    return torch.from_numpy(array)


def _require_checksum(
    path: Path, name: str, checksum: np.ndarray | int, file: h5py.File, rows: tuple[slice, ...] = ()
) -> None:
    stored = own_dataset(member(file, "checksums", h5py.Group), name)
    if not np.array_equal(stored[rows], checksum):
        raise TrajectoryFormatError(
            f"{path} is damaged: {name!r} does not match its checksum. {SCORES.advice}"
        )


def _row_checksums(array: np.ndarray) -> np.ndarray:
    """CRC-32 of each row, the last axis."""
    checksums = np.empty(array.shape[:-1], np.uint32)
    for row in np.ndindex(checksums.shape):
        checksums[row] = zlib.crc32(np.ascontiguousarray(array[row]).data)
    return checksums


def _mapped(path: Path, dataset: h5py.Dataset, mode: Literal["r+", "c"]) -> Tensor:
    offset = dataset.id.get_offset()
    if offset is None:  # an empty dataset has no place in the file
        return torch.from_numpy(dataset[...])
    size = dataset.dtype.itemsize * dataset.size
    if offset + size > path.stat().st_size:
        raise OSError("the file ends before its numbers do")
    array = np.memmap(path, dataset.dtype, mode, offset=offset, shape=dataset.shape)
    return torch.from_numpy(array)


def _numpy_dtype(dtype: torch.dtype) -> str:
    dtypes = {torch.float32: "<f4", torch.float64: "<f8"}
    if dtype not in dtypes:
        raise TypeError(f"Scores are stored as float32 or float64, got {dtype}.")
    return dtypes[dtype]


def _provenance_json(provenance: Mapping[str, object]) -> str:
    try:
        return to_json(provenance)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"provenance must hold only what JSON can hold (text, numbers, lists, dictionaries): "
            f"{error}."
        ) from error


def require_free(path: Path, overwrite: bool) -> None:
    """Refuse a path at which there is a file already, unless it is to be replaced.

    Raises:
        FileExistsError: names it.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists and is kept. Choose another path, or pass overwrite=True."
        )


class ScoreFile(MemorySink):
    """Scores gathered in a file by blocks, so that they are bounded by disk and not by memory.

    The matrix is mapped into memory, where the operating system keeps what fits. Use it as a
    context manager, or call :meth:`abort` on failure: without :meth:`finish` nothing appears
    under ``path``.

    Args:
        path: where the finished file goes.
        num_queries: rows.
        num_train: columns.
        num_segments: when given, each block belongs to a segment and ``values`` is their sum.
        dtype: float32 or float64.
        num_members: when given, each block belongs to a member of an ensemble.
        num_timesteps: when given, scores are also kept by timestep.
        overwrite: replace an existing file. It stays whole until :meth:`finish`.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` was not asked for.
        OSError: the disk has no room for the matrix; raised before the work begins.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_queries: int,
        num_train: int,
        num_segments: int | None = None,
        dtype: torch.dtype = torch.float32,
        num_members: int | None = None,
        num_timesteps: int | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.overwrite = overwrite
        require_free(self.path, overwrite)
        make_folder(self.path.parent)
        self._part = part_path(self.path)
        self.by_segment = None
        self.self_influence = None
        self.by_token = None
        self.by_query_token = None
        self.candidates = None
        shapes: dict[str, tuple[int, ...]] = {"values": (num_queries, num_train)}
        if num_segments is not None:
            shapes["by_segment"] = (num_segments, num_queries, num_train)
        if num_members is not None:
            shapes["members"] = (num_members, num_queries, num_train)
        if num_timesteps is not None:
            shapes["by_timestep"] = (num_timesteps, num_queries, num_train)
        try:
            with hdf5_file(self._part, "w") as file:
                put_header(file, SCORES, _WITHOUT_CANDIDATES)
                for name, shape in shapes.items():
                    dataset = file.create_dataset(name, shape, _numpy_dtype(dtype))
                    # Zeros take the disk space now: a mapped write to a full disk would kill the
                    # process.
                    for row in np.ndindex(shape[:-1]):
                        dataset[row] = 0
            with h5py.File(self._part, "r") as file:
                for name in shapes:
                    setattr(self, name, _mapped(self._part, file[name], "r+"))
        except BaseException:
            self.abort()
            raise

    def finish(self, provenance: Provenance) -> Scores:
        """Write what is left, move the file to its name and return the scores, mapped."""
        self._sum_segments()
        if self.candidates is None:
            require_finite(self.values)
        else:
            require_scored(self.values, self.candidates)
        try:
            with hdf5_file(self._part, "r+") as file:
                _complete(file, self, _provenance_json(provenance))
            require_free(self.path, self.overwrite)
            publish(self._part, self.path)
        except BaseException:
            self.abort()
            raise
        return read_scores(self.path, mapped=True)

    def abort(self) -> None:
        """Give up and leave nothing behind. After :meth:`finish` it does nothing."""
        with suppress(OSError):
            self._part.unlink(missing_ok=True)

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
