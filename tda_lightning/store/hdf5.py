"""HDF5 as every file of the library uses it: written aside and renamed, checked when read.

Data carry checksums, and ``libver`` asks for the file version whose metadata carry them too, so a
flipped bit is noticed and not computed with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np

from tda_lightning.records.errors import TrajectoryError, TrajectoryFormatError
from tda_lightning.store.atomic_write import AsideFile, replacing
from tda_lightning.store.layout import DTYPE, FileKind, decode, encode
from tda_lightning.store.untrusted import (
    CHUNK_BYTES,
    DAMAGE,
    from_json,
    get_integer,
    get_text,
    member,
    names,
    own_dataset,
    put_text,
    require_regular,
    to_json,
)

if TYPE_CHECKING:
    from torch import Tensor

_COMPACT_BYTES = 1 << 12  # below it, data lie inside the checksummed object header

# torch dtypes that NumPy has; every other one is stored as unsigned integers of its width.
_NUMPY = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("float64", "float32", "float16", "complex64", "complex128", "bool"),
        *("int64", "int32", "int16", "int8", "uint8"),
    )
}
_UNSIGNED = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}
# Views between equal widths go through the signed twin, which every torch release has.
_SIGNED = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}


@contextmanager
def writing(path: Path, kind: FileKind) -> Iterator[h5py.File]:
    """A new file that appears under ``path``, in an existing folder, whole or not at all.

    Raises:
        OSError: the disk is full, the folder is gone or may not be written to.
    """
    with replacing(path) as part, hdf5_file(part, "w") as file:
        put_header(file, kind, kind.newest)
        yield file


@contextmanager
def hdf5_file(path: Path, mode: Literal["w", "r+"]) -> Iterator[h5py.File]:
    """The file at ``path``, open for writing and synchronised at the end.

    Raises:
        OSError: the disk is full, or the file may not be written to.
    """
    with AsideFile(path, mode) as target:
        try:
            with h5py.File(target, mode, libver=("v110", "v110")) as file:
                yield file
        except Exception:
            target.check()  # what HDF5 makes of a dropped write helps nobody
            raise
        target.finish()


@contextmanager
def reading(path: Path, kind: FileKind) -> Iterator[h5py.File]:
    """An existing file.

    Raises:
        FileNotFoundError: there is none.
        TrajectoryFormatError: it is damaged, of another kind or version, or the code that reads it
            raised an error that damage leads to.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no {kind.name} file at {path}.")
    require_regular(path)
    try:
        with h5py.File(path, "r") as file:
            require_header(file, path, kind)
            yield file
    except (TrajectoryError, PermissionError):
        raise
    except DAMAGE as error:
        raise damaged(path, kind, error) from error


def damaged(path: Path, kind: FileKind, error: Exception) -> TrajectoryFormatError:
    """The error that says that ``path`` is damaged, and what to do."""
    return TrajectoryFormatError(
        f"{path} is damaged: expected a complete {kind.name} file of tda-lightning, got "
        f"{type(error).__name__}: {error}. {kind.advice}"
    )


def put_header(file: h5py.File, kind: FileKind, version: int) -> None:
    """Store what the file is in its root attributes."""
    put_text(file, "format", kind.format)
    file.attrs[kind.version_attribute] = version
    if kind.has_kind:
        put_text(file, "kind", kind.name)


def require_header(file: h5py.File, path: Path, kind: FileKind) -> None:
    """Check that ``file`` is of a kind, and of a format version that this release reads.

    Raises:
        TrajectoryFormatError: it is not.
    """
    header = file.attrs  # each access opens the root anew
    attribute = kind.version_attribute
    version = get_integer(header, attribute) if attribute in header else kind.newest
    if 0 < version < kind.oldest:  # its text, the name of the format too, is of another type
        raise TrajectoryFormatError(
            f"{path} has format version {version}, which this release of tda-lightning no longer "
            f"reads: expected version {kind.oldest}. {kind.older}"
        )
    expected = (kind.format, kind.name) if kind.has_kind else (kind.format,)
    attributes = ("format", "kind")[: len(expected)]
    got = tuple(get_text(header, name) for name in attributes if name in header)
    if got != expected:
        raise TrajectoryFormatError(
            f"{path} is not a {kind.name} file of tda-lightning: expected "
            f"{' and '.join(attributes)} {' and '.join(map(repr, expected))}, got "
            f"{' and '.join(map(repr, got)) or 'none'}. Check the path."
        )
    if version > kind.newest:
        raise TrajectoryFormatError(
            f"{path} has {kind.name} format version {version}, and this release of tda-lightning "
            f"reads up to version {kind.newest}. Upgrade tda-lightning."
        )
    if version < 1:
        raise ValueError(f"format version {version}")


def put_array(
    group: h5py.Group, name: str, array: np.ndarray, *, compress: bool = False
) -> h5py.Dataset:
    """Store ``array`` with a checksum."""
    if array.nbytes <= _COMPACT_BYTES:
        return _put_compact(group, name, array)
    packing: dict[str, object] = {"compression": "gzip", "shuffle": True} if compress else {}
    return group.create_dataset(name, data=array, chunks=_chunks(array), fletcher32=True, **packing)


def _put_compact(group: h5py.Group, name: str, array: np.ndarray) -> h5py.Dataset:
    """Below h5py's own ``create_dataset``, which takes three times as long over a small array."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.COMPACT)
    plan.set_obj_track_times(False)  # the same content is the same file, whenever it is written
    kind = h5py.h5t.py_create(array.dtype, logical=True)
    space = h5py.h5s.create_simple(array.shape) if array.ndim else h5py.h5s.create(h5py.h5s.SCALAR)
    stored = h5py.h5d.create(group.id, name.encode(), kind, space, plan, _names_in_utf8())
    if array.size:
        stored.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(array))
    return h5py.Dataset(stored)


@cache
def _names_in_utf8() -> h5py.h5p.PropLCID:
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    return links


def _chunks(array: np.ndarray) -> tuple[int, ...]:
    """Whole trailing axes, cut where a chunk would grow beyond a few megabytes."""
    room = max(1, CHUNK_BYTES // array.itemsize)
    chunks = []
    for length in reversed(array.shape):
        chunks.append(_even(length, max(1, room)))
        room //= chunks[-1]
    return tuple(reversed(chunks))


def _even(length: int, room: int) -> int:
    """A chunk of at most ``room`` that fills the last one well: HDF5 stores all of it."""
    fewest = -(-length // room)
    sizes = [-(-length // count) for count in range(max(1, fewest), fewest + 16)]
    return max(1, min(sizes, key=lambda size: -(-length // max(1, size)) * size))


def get_array(group: h5py.Group, name: str, dtype: np.dtype | str) -> np.ndarray:
    """Read what :func:`put_array` stored, refusing whatever it would not have written."""
    return _values(own_dataset(group, name), dtype)


def _values(dataset: h5py.Dataset, dtype: np.dtype | str) -> np.ndarray:
    stored = dataset.id.dtype
    if stored != np.dtype(dtype):
        raise ValueError(f"{dataset.name} has dtype {stored}, expected {dtype}")
    values = np.empty(dataset.id.shape, stored)
    if values.size:
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def subgroup(group: h5py.Group, name: str) -> h5py.Group:
    """The group ``name``, which lies in the file itself."""
    return member(group, name, h5py.Group)


def put_tensors(group: h5py.Group, tensors: Mapping[str, Tensor]) -> None:
    """Store every tensor exactly, in its own dtype."""
    import torch  # here, as below: `tda inspect` reads arrays, and torch takes seconds to import

    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        dataset = put_array(group, encode(name), _to_numpy(tensor))
        put_text(dataset, DTYPE, dtype_name(tensor))


def get_tensors(group: h5py.Group) -> dict[str, Tensor]:
    """Read what :func:`put_tensors` stored."""
    return {decode(name): _get_tensor(group, name) for name in names(group)}


def get_arrays(group: h5py.Group) -> dict[str, np.ndarray | Tensor]:
    """Read what :func:`put_tensors` stored, as arrays where NumPy has the dtype.

    The others, such as bfloat16, are tensors. :func:`dtype_name` is that of either.
    """
    return {decode(name): _get_stored(group, name) for name in names(group)}


def dtype_name(values: Any) -> str:
    """The name of an array's or a tensor's dtype, as torch spells it."""
    return str(values.dtype).removeprefix("torch.")


def is_dtype(name: object) -> bool:
    """Whether ``name`` is a dtype of torch."""
    if not isinstance(name, str):
        return False
    if name in _NUMPY:
        return True
    import torch

    return isinstance(getattr(torch, name, None), torch.dtype)


def _get_tensor(group: h5py.Group, name: str) -> Tensor:
    import torch

    stored = _get_stored(group, name)
    return torch.from_numpy(stored) if isinstance(stored, np.ndarray) else stored


def _get_stored(group: h5py.Group, name: str) -> np.ndarray | Tensor:
    dataset = own_dataset(group, name)
    stored = get_text(dataset.attrs, DTYPE)
    if stored in _NUMPY:
        return _values(dataset, _NUMPY[stored])
    if not is_dtype(stored):
        raise ValueError(f"{name!r} in {group.name} has an unknown dtype")
    import torch

    dtype: torch.dtype = getattr(torch, stored)
    array = _values(dataset, _UNSIGNED[dtype.itemsize])
    signed = torch.from_numpy(array.view(array.dtype.str.replace("u", "i")))
    # A tensor without axes can only be viewed in another dtype by way of an axis.
    return signed.reshape(-1).view(dtype).reshape(array.shape)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    import torch

    if dtype_name(tensor) in _NUMPY:
        return tensor.numpy()
    width = tensor.dtype.itemsize
    signed = tensor.reshape(-1).view(getattr(torch, _SIGNED[width])).numpy()
    return signed.view(_UNSIGNED[width]).reshape(tuple(tensor.shape))


def put_json(group: h5py.Group, name: str, value: object) -> None:
    """Store ``value`` as JSON text [1].

    Raises:
        TypeError, ValueError: ``value`` is not what JSON can hold.
    """
    text = to_json(value).encode()
    kind = h5py.string_dtype("utf-8", len(text))
    put_array(group, name, np.array([text], dtype=kind), compress=True)


def get_json(group: h5py.Group, name: str) -> Any:
    """Read what :func:`put_json` stored."""
    dataset = own_dataset(group, name)
    if dataset.dtype.kind != "S" or dataset.shape != (1,):
        raise ValueError(f"{dataset.name} is not one text")
    return from_json(_values(dataset, dataset.dtype)[0])
