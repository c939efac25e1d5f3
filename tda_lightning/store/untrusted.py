"""Checks on what a file holds before HDF5 reads it, as a file may come from anywhere.

HDF5 follows links, virtual and external datasets into other files, allocates whatever a header
claims, waits for ever at a pipe, and can hang in a damaged heap of text. The library never writes
any of these, so it reads none of them.
"""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from tda_lightning.records.errors import TrajectoryFormatError

Kind = TypeVar("Kind", h5py.Dataset, h5py.Group)
_IDENTIFIERS = {h5py.Dataset: h5py.h5d.DatasetID, h5py.Group: h5py.h5g.GroupID}

CHUNK_BYTES = 1 << 22
_INFLATION = 1100  # deflate packs nothing tighter than this
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
_DEPTH = 100  # of nested JSON: what is deeper could not be shown either

# What h5py, NumPy and the checks here raise depends on where the damage lies.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def require_regular(path: Path) -> None:
    """Check that ``path`` is a file: opening a pipe would wait for ever.

    Raises:
        FileNotFoundError: there is nothing.
        TrajectoryFormatError: it is something else.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise TrajectoryFormatError(f"{path} is {what}, expected a file. Check the path.")


def member(group: h5py.Group, name: str, kind: type[Kind]) -> Kind:
    """A dataset or group that lies in the file itself: links may lead out of it."""
    if "/" in name or name in ("", "."):
        raise KeyError(f"{group.name} cannot have a member {name!r}")
    key = name.encode()
    if not group.id.links.exists(key) or group.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
        raise KeyError(f"{group.name} has no {name!r}")
    # Below h5py's own classes, which take several times as long over the many small tensors.
    opened = h5py.h5o.open(group.id, key)
    if not isinstance(opened, _IDENTIFIERS[kind]):
        raise TypeError(f"{name!r} in {group.name} is not a {kind.__name__}")
    return kind(opened)


def has(group: h5py.Group, name: str) -> bool:
    """Whether there is a link ``name``, without following it as ``in`` does."""
    return bool(group.id.links.exists(name.encode()))


def names(group: h5py.Group) -> list[str]:
    """The names in ``group``, which are UTF-8: h5py gives others as bytes."""
    found = list(group)
    if odd := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"{group.name} has names that are not UTF-8, such as {odd[0][:100]!r}")
    return found


def own_dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """A dataset whose values lie in the file, and whose size fits what the file stores."""
    dataset = member(group, name, h5py.Dataset)
    plan = dataset.id.get_create_plist()
    # Before its shape is asked for: that of a virtual one depends on other files.
    if plan.get_layout() == h5py.h5d.VIRTUAL or plan.get_external_count():
        raise ValueError(f"{dataset.name} lies in another file")
    filters = {plan.get_filter(number)[0] for number in range(plan.get_nfilters())}
    dtype, shape = dataset.id.dtype, dataset.id.shape
    chunks = plan.get_chunk() if plan.get_layout() == h5py.h5d.CHUNKED else (0,)
    if not filters <= _FILTERS:
        raise ValueError(f"{dataset.name} is packed by unknown filters {sorted(filters)}")
    if dtype.kind not in "biufcS" or shape is None:
        raise ValueError(f"{dataset.name} holds no numbers or text, but {dtype}")
    chunk = math.prod(chunks) * dtype.itemsize
    packed = h5py.h5z.FILTER_DEFLATE in filters
    room = dataset.id.get_storage_size() * (_INFLATION if packed else 1)
    whole = math.prod(shape) * dtype.itemsize
    if whole > room or chunk > CHUNK_BYTES:
        raise ValueError(
            f"{dataset.name} claims {whole} bytes in chunks of {chunk}, and holds "
            f"{dataset.id.get_storage_size()}"
        )
    return dataset


def put_text(holder: h5py.File | h5py.Dataset, name: str, text: str) -> None:
    """A new attribute of fixed length: the other kind of text lies in a heap without a checksum."""
    value = np.array(text.encode())
    # Below h5py's own classes, which first write under another name in case there is one already.
    kind = h5py.h5t.py_create(value.dtype, logical=True)
    space = h5py.h5s.create(h5py.h5s.SCALAR)
    h5py.h5a.create(holder.id, name.encode(), kind, space).write(value)


def get_text(attributes: h5py.AttributeManager, name: str) -> str:
    """What :func:`put_text` stored."""
    attribute = attributes.get_id(name)
    kind = attribute.get_type()
    if not isinstance(kind, h5py.h5t.TypeStringID) or kind.is_variable_str():
        raise TypeError(f"attribute {name!r} is not a text of fixed length")
    if attribute.shape != ():
        raise TypeError(f"attribute {name!r} is not one text")
    return bytes(_scalar(attribute)).decode()


def get_integer(attributes: h5py.AttributeManager, name: str) -> int:
    """An attribute that must be one integer."""
    attribute = attributes.get_id(name)
    if attribute.dtype.kind not in "iu" or attribute.shape != ():
        raise TypeError(f"attribute {name!r} is not an integer")
    return int(_scalar(attribute))


def _scalar(attribute: h5py.h5a.AttrID) -> Any:
    value = np.empty((), attribute.dtype)
    attribute.read(value)
    return value[()]


def to_json(value: object) -> str:
    """JSON text that :func:`from_json` reads.

    Raises:
        TypeError, ValueError: ``value`` is not what JSON can hold, or nested too deep.
    """
    _require_shallow(value)
    return json.dumps(value)


def from_json(text: bytes) -> Any:
    """The value that :func:`to_json` was given.

    Raises:
        ValueError: ``text`` is not JSON, or nested too deep.
    """
    value = json.loads(text.decode())
    _require_shallow(value)
    return value


def _require_shallow(value: object, depth: int = 0) -> None:
    if depth >= _DEPTH:
        raise ValueError(f"JSON is nested more than {_DEPTH} deep")
    if isinstance(value, (dict, list, tuple)):
        for entry in value.values() if isinstance(value, dict) else value:
            _require_shallow(entry, depth + 1)
