"""The files of an index of gradients; :mod:`tda_lightning.store.layout` describes them.

A shard's numbers lie in one piece in its file, so that a reader maps them into memory and reads
them from front to back, and stay readable with h5py alone.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from torch import Tensor

from tda_lightning.store.atomic_write import make_folder, replacing
from tda_lightning.store.hdf5 import (
    get_array,
    get_json,
    get_tensors,
    put_array,
    put_json,
    put_tensors,
    reading,
    subgroup,
    writing,
)
from tda_lightning.store.layout import (
    COMPRESSION,
    COMPRESSION_FILE,
    INDEX,
    INDEX_FILE,
    SHARD,
    VALUES,
    shard_file,
)
from tda_lightning.store.untrusted import get_integer, get_text, own_dataset, put_text

T = TypeVar("T")
# What NumPy calls the numbers of a type; two of int4 lie in a byte.
DTYPES = {
    "int4": "int8",
    "int8": "int8",
    "float16": "float16",
    "float32": "float32",
    "float64": "float64",
}
_CODES, _SCALES, _ABOUT = "codes", "scales", "about"


@dataclass(frozen=True)
class Shard:
    """Some rows of an index, mapped into memory: row n stands for ``scales[n] * codes[n]``.

    Attributes:
        path: the file.
        first: number of its first row.
        codes: [row, column]: a number each, or two of int4.
        scales: float32 [row], or float64 for codes in float64.
        checksum: CRC-32 of the codes as they were written.
    """

    path: Path
    first: int
    codes: np.ndarray
    scales: np.ndarray
    checksum: int

    @property
    def stop(self) -> int:
        """The number after that of its last row."""
        return self.first + len(self.codes)

    @property
    def whole(self) -> bool:
        """Whether the codes are as they were written: reads all of them."""
        return _checksum(self.codes) == self.checksum


def write_about(root: Path, about: Mapping[str, Any]) -> None:
    """Write what an index is, replacing what stood there.

    Raises:
        OSError: the disk is full, or the folder may not be written to.
    """
    make_folder(root)
    with writing(root / INDEX_FILE, INDEX) as file:
        put_json(file, _ABOUT, dict(about))


def read_about(root: Path, of: Callable[[dict[str, Any]], T]) -> T:
    """What :func:`write_about` wrote, as ``of`` understands it.

    Raises:
        FileNotFoundError: there is no index.
        TrajectoryFormatError: the file is damaged or of another format version.
    """
    with reading(root / INDEX_FILE, INDEX) as file:
        return of(get_json(file, _ABOUT))


def write_compression(root: Path, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Write how gradients are compressed."""
    make_folder(root)
    with writing(root / COMPRESSION_FILE, COMPRESSION) as file:
        put_text(file, "compression", kind)
        put_tensors(file.create_group(VALUES), tensors)


def read_compression(root: Path, of: Callable[[str, dict[str, Tensor]], T]) -> T:
    """What :func:`write_compression` wrote, as ``of`` understands it.

    Raises:
        FileNotFoundError: there is none.
        TrajectoryFormatError: the file is damaged or of another format version.
    """
    with reading(root / COMPRESSION_FILE, COMPRESSION) as file:
        return of(get_text(file.attrs, "compression"), get_tensors(subgroup(file, VALUES)))


def write_shard(
    root: Path, first: int, codes: np.ndarray, scales: np.ndarray, compression: str
) -> None:
    """Write the rows from ``first`` on.

    Args:
        codes: [row, width].
        scales: [row].
        compression: digest of what made the codes.
    """
    path = shard_file(root, first, first + len(codes))
    make_folder(path.parent)
    codes = np.ascontiguousarray(codes)
    with writing(path, SHARD) as file:
        put_text(file, "compression", compression)
        file.attrs["first"] = first
        file.attrs["checksum"] = _checksum(codes)
        file[_CODES] = codes
        put_array(file, _SCALES, scales)


def read_shard(path: Path, compression: str, width: int, dtype: str) -> Shard:
    """The shard at ``path``, its codes mapped and not read yet.

    Raises:
        FileNotFoundError: there is none.
        TrajectoryFormatError: it is damaged, or belongs to another index.
    """
    with reading(path, SHARD) as file:
        if get_text(file.attrs, "compression") != compression:
            raise ValueError("it belongs to another index")
        codes = own_dataset(file, _CODES)
        if codes.dtype != np.dtype(DTYPES[dtype]).newbyteorder("<") or codes.ndim != 2:
            raise TypeError(f"its codes are {codes.dtype} in {codes.ndim} dimensions")
        if codes.shape[1] != columns_of(width, dtype) or not len(codes):
            raise ValueError(f"its codes are of shape {codes.shape}, expected width {width}")
        scales = get_array(file, _SCALES, scale_dtype(dtype))
        first = get_integer(file.attrs, "first")
        if scales.shape != codes.shape[:1] or not np.isfinite(scales).all():
            raise ValueError(f"its scales are of shape {scales.shape}, or not finite")
        if path.name != shard_file(path.parent, first, first + len(codes)).name:
            raise ValueError(f"it holds {len(codes)} rows from {first}")
        return Shard(path, first, _mapped(path, codes), scales, get_integer(file.attrs, "checksum"))


def columns_of(width: int, dtype: str) -> int:
    """Columns of the codes of so many numbers."""
    return -(-width // 2) if dtype == "int4" else width


def scale_dtype(dtype: str) -> str:
    """Type of a row's scale, for codes of a type."""
    return "<f8" if dtype == "float64" else "<f4"


def _mapped(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    offset = dataset.id.get_offset()
    if offset is None or dataset.chunks is not None:
        raise ValueError("its codes do not lie in one piece")
    if offset + dataset.dtype.itemsize * dataset.size > path.stat().st_size:
        raise OSError("the file ends before its codes do")
    # Copied where it is written to, which nobody does: torch warns of arrays that are read-only.
    return np.memmap(path, dataset.dtype, "c", offset=offset, shape=dataset.shape)


def _checksum(codes: np.ndarray) -> int:
    return zlib.crc32(codes.data)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file of an index, which appears whole or not at all."""
    make_folder(target.parent)
    with replacing(target) as part:
        shutil.copyfile(source, part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
