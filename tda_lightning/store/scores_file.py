"""The scores file: one HDF5 file, readable with h5py alone.

Layout, format version 1, or 2 with candidates::

    /                       attributes: format = "tda-lightning scores", format_version
    /values                 float32 or float64 [query, train]; NaN where there is no score
    /by_segment             the same type [segment, query, train]; absent without segments
    /self_influence         the same type [train]; absent when not computed
    /by_token               the same type [query, train, position]; absent when not asked for
    /candidates             int64 [query, k], the training examples that were scored for each query,
                            nearest first; absent where all were scored
    /provenance             text, a JSON object: how the scores were made
    /checksums/values       uint32 [query], CRC-32 of the bytes of each row of /values
    /checksums/by_segment   uint32 [segment, query]
    /checksums/self_influence  uint32 scalar
    /checksums/by_token     uint32 [query, train]
    /checksums/candidates   uint32 [query]
    /checksums/provenance   uint32 scalar

The numbers lie contiguously and uncompressed, so that a file larger than memory can be mapped.
Every file is written aside, under ``<name>.<process>.part``, and renamed when it is whole.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import h5py
import numpy as np
import torch
from torch import Tensor

from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.score_sinks import MemorySink
from tda_lightning.records.scores import Scores, require_finite, require_scored
from tda_lightning.store.untrusted import (
    DAMAGE,
    from_json,
    get_integer,
    get_text,
    has,
    member,
    own_dataset,
    put_text,
    require_regular,
    to_json,
)

FORMAT = "tda-lightning scores"
FORMAT_VERSION = 2  # the newest that is read
_WITHOUT_CANDIDATES = 1  # what earlier releases read, too
# Provenance entries with one item per query: cut along with the rows.
_PER_QUERY = ("predictions", "measurements", "query_indices")


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
        overwrite: replace an existing file. It stays whole until :meth:`finish`.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` was not asked for.
        OSError: the disk has no room for the matrix, found out before the work begins.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_queries: int,
        num_train: int,
        num_segments: int | None = None,
        dtype: torch.dtype = torch.float32,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.overwrite = overwrite
        self._require_free()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        self.by_segment = None
        self.self_influence = None
        self.by_token = None
        self.candidates = None
        shape = (num_queries, num_train)
        kind = _numpy_type(dtype)
        try:
            # The latest layout guards HDF5's own records with checksums.
            with h5py.File(self._part, "w", libver="latest") as file:
                put_text(file.attrs, "format", FORMAT)
                file.attrs["format_version"] = _WITHOUT_CANDIDATES
                _reserve(file.create_dataset("values", shape, kind))
                if num_segments is not None:
                    _reserve(file.create_dataset("by_segment", (num_segments, *shape), kind))
            with h5py.File(self._part, "r") as file:
                self.values = _mapped(self._part, file["values"], "r+")
                if num_segments is not None:
                    self.by_segment = _mapped(self._part, file["by_segment"], "r+")
        except BaseException:
            self._part.unlink(missing_ok=True)
            raise

    def finish(self, provenance: Provenance) -> Scores:
        """Write what is left, move the file to its name and return the scores, mapped."""
        self._sum_segments()
        if self.candidates is None:
            require_finite(self.values)
        else:
            require_scored(self.values, self.candidates)
        self.publish(provenance)
        return read_scores(self.path, mapped=True)

    def publish(self, provenance: Provenance) -> None:
        """Write what is left and move the file to its name."""
        try:
            self._write_rest(_to_json(provenance))
            self._require_free()
            os.replace(self._part, self.path)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Give up and leave nothing behind. After :meth:`finish` it does nothing."""
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _require_free(self) -> None:
        if self.path.exists() and not self.overwrite:
            raise FileExistsError(
                f"{self.path} exists and is kept. Choose another path, or pass overwrite=True."
            )

    def _write_rest(self, provenance: str) -> None:
        arrays = {"values": self.values, "by_segment": self.by_segment}
        with h5py.File(self._part, "r+", libver="latest") as file:
            for name, array in arrays.items():
                if array is not None:
                    file[f"checksums/{name}"] = _row_checksums(array.numpy())
            if self.self_influence is not None:
                file["self_influence"] = self.self_influence.numpy()
                file["checksums/self_influence"] = _checksum(self.self_influence.numpy())
            if self.by_token is not None:
                file["by_token"] = self.by_token.contiguous().numpy()
                file["checksums/by_token"] = _row_checksums(self.by_token.contiguous().numpy())
            if self.candidates is not None:
                file.attrs["format_version"] = FORMAT_VERSION
                file["candidates"] = self.candidates.contiguous().numpy()
                file["checksums/candidates"] = _row_checksums(self.candidates.contiguous().numpy())
            file["provenance"] = _text(provenance)
            file["checksums/provenance"] = np.uint32(zlib.crc32(provenance.encode()))


def write_scores(scores: Scores, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Save ``scores`` at ``path``; see :meth:`tda_lightning.Scores.save`."""
    segments = None if scores.by_segment is None else len(scores.by_segment)
    sizes = (scores.num_queries, scores.num_train, segments)
    with ScoreFile(path, *sizes, dtype=scores.values.dtype, overwrite=overwrite) as file:
        if scores.candidates is not None:
            file.set_candidates(scores.candidates)
        file.values.copy_(scores.values)
        if file.by_segment is not None and scores.by_segment is not None:
            file.by_segment.copy_(scores.by_segment)
        if scores.self_influence is not None:
            file.set_self_influence(scores.self_influence)
        if scores.by_token is not None:
            file.set_by_token(scores.by_token)
        file.publish(scores.provenance)


def replace_provenance(path: str | os.PathLike[str], provenance: Mapping[str, Any]) -> None:
    """Give the file at ``path`` another provenance; its numbers stay, with their checksums.

    Raises:
        OSError: the disk has no room for a copy, which then takes the file's place.
        TrajectoryFormatError: the file is damaged or holds no scores.
    """
    path, text = Path(path), _to_json(provenance)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    require_regular(path)
    try:
        shutil.copyfile(path, part)
        with h5py.File(part, "r+", libver="latest") as file:
            _require_format(path, file)
            for name in ("provenance", "checksums/provenance"):
                del file[name]
            file["provenance"] = _text(text)
            file["checksums/provenance"] = np.uint32(zlib.crc32(text.encode()))
        os.replace(part, path)
    except (TrajectoryFormatError, PermissionError):
        raise
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise TrajectoryFormatError(
            f"{path} is damaged or no scores file ({error}). Save the scores again."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def read_scores(
    path: str | os.PathLike[str], queries: slice | None = None, mapped: bool = False
) -> Scores:
    """Load scores from ``path``; see :meth:`tda_lightning.Scores.load`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no scores file at {path}.")
    require_regular(path)
    rows = slice(None) if queries is None else queries
    if rows.step is not None and rows.step < 1:
        raise ValueError(f"queries must be a slice with a positive step, got {rows}.")
    try:
        with h5py.File(path, "r") as file:
            _require_format(path, file)
            count = len(own_dataset(file, "values"))
            provenance = _cut(_read_json(path, file), rows, count, queries is not None)
            values = _read(path, file, "values", (rows,), mapped)
            by_segment = _read(path, file, "by_segment", (slice(None), rows), mapped)
            self_influence = _read(path, file, "self_influence", (), False)
            by_token = _read(path, file, "by_token", (rows,), mapped)
            candidates = _read_candidates(path, file, rows)
            assert values is not None
            made = cast(Provenance, provenance)
            return Scores(values, by_segment, self_influence, made, by_token, candidates)
    except (TrajectoryFormatError, PermissionError):
        raise
    except DAMAGE as error:
        raise TrajectoryFormatError(
            f"{path} is damaged or no scores file ({error}). Save the scores again."
        ) from error


def _read_json(path: Path, file: h5py.File) -> dict[str, Any]:
    dataset = own_dataset(file, "provenance")
    if dataset.dtype.kind != "S" or dataset.shape != ():
        raise TypeError("its provenance is no text")
    text = bytes(dataset[()])
    _compare(path, "provenance", zlib.crc32(text), file)
    provenance = from_json(text)
    if not isinstance(provenance, dict):
        raise TypeError("its provenance is no JSON object")
    return provenance


def _require_format(path: Path, file: h5py.File) -> None:
    found = get_text(file.attrs, "format") if "format" in file.attrs else None
    if found != FORMAT:
        raise TrajectoryFormatError(
            f"{path} is an HDF5 file but holds no scores: expected format = {FORMAT!r}, got "
            f"{found!r}. Give a file written by Scores.save."
        )
    version = get_integer(file.attrs, "format_version")
    if version < 1:
        raise ValueError(f"format version {version}")
    if version > FORMAT_VERSION:
        raise TrajectoryFormatError(
            f"{path} has scores format version {version}; this release reads up to "
            f"{FORMAT_VERSION}. Upgrade tda-lightning."
        )


def _read(
    path: Path, file: h5py.File, name: str, rows: tuple[slice, ...], mapped: bool
) -> Tensor | None:
    if not has(file, name) and name != "values":
        return None
    dataset = own_dataset(file, name)
    if dataset.dtype not in ("<f4", "<f8") or dataset.dtype != file["values"].dtype:
        raise TypeError(f"{name!r} holds {dataset.dtype}")
    if mapped:
        return _mapped(path, dataset, "c")[rows]
    array = dataset[rows]
    found = _row_checksums(array) if rows else _checksum(array)
    _compare(path, name, found, file, rows)
    # Scores themselves check those of candidates.
    if not np.isfinite(array).all() and not (name == "values" and has(file, "candidates")):
        raise ValueError(f"{name!r} is not finite")
    return torch.from_numpy(array)


def _read_candidates(path: Path, file: h5py.File, rows: slice) -> Tensor | None:
    if not has(file, "candidates"):
        return None
    dataset = own_dataset(file, "candidates")
    if dataset.dtype != "<i8" or dataset.ndim != 2:
        raise TypeError(f"'candidates' holds {dataset.dtype} of shape {dataset.shape}")
    array = dataset[rows]
    _compare(path, "candidates", _row_checksums(array), file, (rows,))
    return torch.from_numpy(array)


def _compare(
    path: Path, name: str, found: Any, file: h5py.File, rows: tuple[slice, ...] = ()
) -> None:
    checksums = own_dataset(member(file, "checksums", h5py.Group), name)
    if not np.array_equal(checksums[rows], found):
        raise TrajectoryFormatError(
            f"{path} is damaged: {name!r} does not match its checksum. Make the scores again."
        )


def _cut(provenance: dict[str, Any], rows: slice, count: int, partial: bool) -> dict[str, Any]:
    if not partial:
        return provenance
    provenance.setdefault("query_indices", list(range(count)))
    for name in _PER_QUERY:
        if name in provenance:
            provenance[name] = provenance[name][rows]
    return provenance


def _reserve(dataset: h5py.Dataset) -> None:
    # Zeros written now take the disk space now: a mapped write to a full disk kills the process.
    for row in np.ndindex(dataset.shape[:-1]):
        dataset[row] = 0


def _mapped(path: Path, dataset: h5py.Dataset, mode: Literal["r+", "c"]) -> Tensor:
    offset = dataset.id.get_offset()
    if offset is None:  # an empty dataset has no place in the file
        return torch.from_numpy(dataset[...])
    size = dataset.dtype.itemsize * dataset.size
    if offset + size > path.stat().st_size:
        raise OSError("the file ends before its numbers do")
    array = np.memmap(path, dataset.dtype, mode, offset=offset, shape=dataset.shape)
    return torch.from_numpy(array)


def _text(text: str) -> np.bytes_:
    # Text of fixed length: HDF5 keeps the other kind in a heap without checksum, and a damaged
    # heap can hang its reader.
    return np.bytes_(text.encode())


def _numpy_type(dtype: torch.dtype) -> str:
    kinds = {torch.float32: "<f4", torch.float64: "<f8"}
    if dtype not in kinds:
        raise TypeError(f"Scores are stored as float32 or float64, got {dtype}.")
    return kinds[dtype]


def _checksum(array: np.ndarray) -> np.uint32:
    return np.uint32(zlib.crc32(np.ascontiguousarray(array).data))


def _row_checksums(array: np.ndarray) -> np.ndarray:
    checksums = np.empty(array.shape[:-1], np.uint32)
    for row in np.ndindex(checksums.shape):
        checksums[row] = _checksum(array[row])
    return checksums


def _to_json(provenance: Mapping[str, Any]) -> str:
    try:
        return to_json(provenance)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"provenance must hold only what JSON can hold (text, numbers, lists, dictionaries): "
            f"{error}."
        ) from error
