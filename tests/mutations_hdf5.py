"""Damage done through h5py: whatever HDF5 can express and the reader must refuse or survive."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests import mutations_structure as structure
from tests.mutations import Mutation, Place

TEXTS = ("facts", "provenance", "blocks", "about")  # datasets of JSON


def _on_file(change: Callable[[random.Random, h5py.File, Place], object]) -> Mutation:
    def apply(generator: random.Random, victim: Path, place: Place) -> None:
        with h5py.File(victim, "r+", libver="latest") as file:
            change(generator, file, place)
            if generator.random() < 0.8:
                _mend_checksums(file)

    return apply


def _on_dataset(change: Callable[[random.Random, np.ndarray], Any]) -> Mutation:
    """Replace the values of a dataset, whose attributes are kept."""

    def apply(generator: random.Random, file: h5py.File, place: Place) -> None:
        group, name = pick(generator, file)
        array, attributes = group[name][()], dict(group[name].attrs)
        if isinstance(array, (bytes, np.bytes_)):
            array = np.asarray(array)
        del group[name]
        group.create_dataset(name, data=change(generator, array))
        group[name].attrs.update(attributes)

    return _on_file(apply)


def _on_json(change: Callable[[random.Random, Any], Any], raw: bool = False) -> Mutation:
    """Replace the JSON text of a file that has one (else its numbers become a text)."""

    def apply(generator: random.Random, file: h5py.File, place: Place) -> None:
        name = next((text for text in TEXTS if text in file), None)
        if name is None:
            group, name = pick(generator, file)
            old, shape = b"{}", (1,)
        else:
            group, shape = file, file[name].shape
            old = bytes(file[name][()].reshape(-1)[0] if shape else file[name][()])
        changed = change(generator, json.loads(old))
        text = changed if raw else json.dumps(changed).encode()
        attributes = dict(group[name].attrs)
        del group[name]
        array = np.full(shape, text, dtype=f"S{max(1, len(text))}")
        group.create_dataset(name, data=array, compression="gzip" if shape else None)
        group[name].attrs.update(attributes)

    return _on_file(apply)


def _mend_checksums(file: h5py.File) -> None:
    """Make the checksums of a scores file agree with what is in it now."""
    if not isinstance(file.get("checksums", getlink=True), h5py.HardLink):
        return
    checksums: dict[str, np.ndarray] = {}
    arrays = ("values", "by_segment", "self_influence", "by_token", "candidates")
    for name in (*arrays, "provenance"):
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            continue
        dataset = file[name]
        plain = isinstance(dataset, h5py.Dataset) and dataset.dtype.kind in "biufcS"
        if not plain or dataset.is_virtual or dataset.external or dataset.shape is None:
            continue
        if dataset.nbytes > 1 << 20:
            continue
        array = np.ascontiguousarray(dataset[()]).reshape(dataset.shape)
        rows = array if array.ndim > 1 else array[None]
        sums = np.empty(rows.shape[:-1], np.uint32)
        for row in np.ndindex(sums.shape):
            sums[row] = zlib.crc32(np.ascontiguousarray(rows[row]).tobytes())
        checksums[name] = sums if array.ndim > 1 else sums.reshape(())
    # In a new group: HDF5 does not always let a link be made again where one was removed.
    del file["checksums"]
    for name, sums in checksums.items():
        file[f"checksums/{name}"] = sums


def pick(generator: random.Random, file: h5py.File) -> tuple[h5py.Group, str]:
    """A dataset by its group and name."""
    found: list[tuple[h5py.Group, str]] = []

    def walk(group: h5py.Group) -> None:
        for name in group:
            if isinstance(group[name], h5py.Group):
                walk(group[name])
            else:
                found.append((group, name))

    walk(file)
    return generator.choice(found)


def _pick_any(generator: random.Random, file: h5py.File) -> tuple[h5py.Group, str]:
    """A dataset, or the group of one."""
    group, name = pick(generator, file)
    if group.name != "/" and generator.random() < 0.3:
        return group.parent, group.name.rpartition("/")[2]
    return group, name


def _replace(make: Callable[[random.Random, h5py.Group, str, Place], object]) -> Mutation:
    """Put something else under the name of a dataset or a group."""

    def apply(generator: random.Random, file: h5py.File, place: Place) -> None:
        group, name = _pick_any(generator, file)
        old = group[name]
        attributes = dict(old.attrs)
        shape = old.shape if isinstance(old, h5py.Dataset) else (2,)
        dtype = old.dtype if isinstance(old, h5py.Dataset) else np.dtype("f4")
        del group[name]
        made = make(generator, group, name, place)
        if isinstance(made, dict):
            group.create_dataset(name, **{"shape": shape, "dtype": dtype, **made})
        if isinstance(group.get(name, getlink=True), h5py.HardLink) and group[name] != group:
            for key, value in attributes.items():
                if key not in group[name].attrs:
                    group[name].attrs[key] = value

    return _on_file(apply)


# Values.

DTYPES = ["i1", "u1", "<i4", "<i8", ">i8", "<u8", "<f2", "<f4", ">f4", "<f8", "<c8", "?", "S7"]


def _cast(generator: random.Random, array: np.ndarray) -> np.ndarray:
    dtype = np.dtype(generator.choice(DTYPES))
    if array.dtype.kind == "S":
        return np.zeros(array.shape, dtype)
    with np.errstate(all="ignore"):
        return (array.real if array.dtype.kind == "c" else array).astype(dtype)


def _reshape(generator: random.Random, array: np.ndarray) -> np.ndarray:
    if generator.random() < 0.3:
        return np.zeros(tuple(generator.choice([0, 1, 2, 7]) for _ in range(3)), array.dtype)
    return array.reshape(generator.choice([(-1,), (1, -1), (-1, 1), (1, 1, 1, -1)]))


def _relength(generator: random.Random, array: np.ndarray) -> np.ndarray:
    if not array.ndim:
        return np.stack([array, array])
    longer = np.concatenate([array, array])
    return generator.choice([array[:-1], array[1:], array[:0], array[:1], longer])


def _fill(*choices: float) -> Mutation:
    """Some values, or all of them, become another."""

    def change(generator: random.Random, array: np.ndarray) -> np.ndarray:
        array, value = array.copy(), generator.choice(choices)
        if array.dtype.kind == "S" or not array.size:
            return array
        if array.dtype.kind in "iu":
            limits = np.iinfo(array.dtype)
            value = 0 if value != value else int(max(min(value, limits.max), limits.min))
        flat = array.reshape(-1)
        whole = generator.random() < 0.5
        flat[slice(None) if whole else generator.randrange(array.size)] = value
        return array

    return _on_dataset(change)


# JSON.

HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    2.5,
    10**11,
    10**18,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "x" * 5000,
    "\x1b[31m[red]\\",
    [],
    [[]],
    {},
    {"..": {"/": [None]}},
    [1] * 50,
]


def _graft(generator: random.Random, value: Any) -> Any:
    """A hostile value somewhere in a nested one; or a key that is gone, added or renamed."""
    if isinstance(value, dict) and value and generator.random() < 0.85:
        key = generator.choice(list(value))
        draw = generator.random()
        if draw < 0.1:
            return {name: entry for name, entry in value.items() if name != key}
        if draw < 0.2:
            odd = generator.choice(["", "../x", "length", "99999999", "٣", "\ud800", "a/b", "."])
            return {**value, odd: value[key]}
        return {**value, key: _graft(generator, value[key])}
    if isinstance(value, list) and value and generator.random() < 0.7:
        place = generator.randrange(len(value))
        return [*value[:place], _graft(generator, value[place]), *value[place + 1 :]]
    return generator.choice(HOSTILE)


def _nested(generator: random.Random, value: Any) -> bytes:
    depth = generator.choice([150, 500, 900, 990, 100_000])
    inner = b"[" * depth + b"]" * depth
    if generator.random() < 0.5 or not isinstance(value, dict) or not value:
        return inner
    name = generator.choice(["settings", "estimator", "notes", "config", "parameters"])
    return json.dumps({**value, name: None}).encode()[:-1] + b', "%s": %s}' % (name.encode(), inner)


def _invalid(generator: random.Random, value: Any) -> bytes:
    text = json.dumps(value).encode()
    bad = [
        b"",
        b"{",
        b"\xff\xfe",
        b"\xc3(",
        text[:-1],
        text + text,
        b"nan",
        b"9" * 6000,
        b"\xef\xbb\xbf{}",
    ]
    return generator.choice(bad)


# Structure.


MEMBERS = [
    b"../x",
    b"..",
    b"/abs",
    b"a" * 5000,
    b"%2F..",
    b"%2e",
    b"%",
    b"\xff\xfe",
    b" ",
    b"\x1b[31m",
]


def _hostile_name(generator: random.Random, file: h5py.File, place: Place) -> None:
    """A member under another name, beside its own or instead of it."""
    group, name = _pick_any(generator, file)
    odd = generator.choice(MEMBERS)
    plan = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    plan.set_create_intermediate_group(True)
    h5py.h5o.link(group[name].id, group.id, odd, lcpl=plan)
    if generator.random() < 0.5:
        del group[name]


def _delete(generator: random.Random, file: h5py.File, place: Place) -> None:
    group, name = _pick_any(generator, file)
    del group[name]


def _exchange(generator: random.Random, file: h5py.File, place: Place) -> None:
    (one, a), (other, b) = pick(generator, file), pick(generator, file)
    if (one, a) != (other, b):
        one.move(a, f"{one.name}/aside")
        file.move(f"{other.name}/{b}", f"{one.name}/{a}")
        file.move(f"{one.name}/aside", f"{other.name}/{b}")


# Attributes.

VALUES: list[Any] = [
    0,
    -1,
    2,
    2**62,
    1.5,
    float("nan"),
    "",
    "x",
    "../x",
    "float32",
    "int64",
    "bfloat16",
    "Tensor",
    "__class__",
    np.bytes_(b"\xff"),
    np.bytes_(b"int64"),
    np.array([1, 1]),
    np.array([], "i8"),
    np.zeros((5, 5)),
    h5py.Empty("i8"),
    np.array(["a", "b"], dtype=h5py.string_dtype()),
    np.array([b"tda-lightning"]),
]


def _owner(generator: random.Random, file: h5py.File) -> Any:
    """The file or a dataset, whichever has attributes."""
    group, name = pick(generator, file)
    return group[name] if len(group[name].attrs) and generator.random() < 0.6 else file


def _attribute_gone(generator: random.Random, file: h5py.File, place: Place) -> None:
    owner = _owner(generator, file)
    del owner.attrs[generator.choice(list(owner.attrs))]


def _attribute_changed(generator: random.Random, file: h5py.File, place: Place) -> None:
    owner = _owner(generator, file)
    owner.attrs[generator.choice(list(owner.attrs))] = generator.choice(VALUES)


def _version(generator: random.Random, file: h5py.File, place: Place) -> None:
    name = "version" if "version" in file.attrs else "format_version"
    file.attrs[name] = generator.choice([0, -1, 2, 99, 2**62, np.uint64(2**64 - 1), "1", 1.0])


def _loose_text(generator: random.Random, file: h5py.File, place: Place) -> None:
    """Text of variable length, which HDF5 keeps in a heap without checksum; some bytes of it are
    then damaged by :func:`_damage_heap`."""
    owner = _owner(generator, file)
    for name in list(owner.attrs):
        value = owner.attrs[name]
        if isinstance(value, (bytes, np.bytes_)):
            owner.attrs[name] = value.decode("utf-8", "replace")


def _damage_heap(generator: random.Random, victim: Path, place: Place) -> None:
    _on_file(_loose_text)(generator, victim, place)
    content = bytearray(victim.read_bytes())
    heap = content.find(b"GCOL")
    if heap >= 0:
        content[heap + generator.randrange(96)] = generator.choice([0, 1, 0xFF, 0x8D])
        victim.write_bytes(content)


CONTENT: dict[str, Mutation] = {
    "dtype": _on_dataset(_cast),
    "shape": _on_dataset(_reshape),
    "length": _on_dataset(_relength),
    "not finite": _fill(float("nan"), float("inf"), float("-inf")),
    "negative": _fill(-1, -(2**40), -1e30),
    "too large": _fill(2**63 - 1, 2**31, 2**32 + 1, 1e300),
    "zeroed": _fill(0),
    "JSON invalid": _on_json(_invalid, raw=True),
    "JSON nested": _on_json(_nested, raw=True),
    "JSON changed": _on_json(_graft),
    "JSON hostile": _on_json(lambda g, value: _graft(g, _graft(g, _graft(g, value)))),
    "huge": _replace(structure.huge),
    "bomb": _replace(structure.bomb),
    "huge chunk": _replace(structure.huge_chunk),
    "virtual": _replace(structure.virtual),
    "external storage": _replace(structure.elsewhere),
    "external link": _replace(structure.external_link),
    "soft link": _replace(structure.soft_link),
    "cycle": _replace(structure.cycle),
    "group": _replace(structure.group),
    "reference": _replace(structure.reference),
    "named type": _replace(structure.named_type),
    "odd type": _replace(structure.odd_type),
    "no value": _replace(structure.nothing),
    "unknown filter": _replace(structure.unknown_filter),
    "other filter": _replace(structure.other_filter),
    "member name": _on_file(_hostile_name),
    "member gone": _on_file(_delete),
    "members exchanged": _on_file(_exchange),
    "attribute gone": _on_file(_attribute_gone),
    "attribute changed": _on_file(_attribute_changed),
    "version": _on_file(_version),
    "loose text": _on_file(_loose_text),
    "damaged heap": _damage_heap,
}
