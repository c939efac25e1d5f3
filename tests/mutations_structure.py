"""What else may stand under the name of a data set: links, other types, claims, foreign files."""

from __future__ import annotations

import random
from typing import Any

import h5py
import numpy as np

from tests.mutations import Place


def filled(shape: tuple[int, ...], dtype: str, **options: Any) -> dict[str, Any]:
    return {"shape": shape, "dtype": dtype, **options}


def huge(generator: random.Random, group: h5py.Group, name: str, place: Place) -> Any:
    """Claims of terabytes, of which nothing is stored."""
    length = generator.choice([10**7, 10**10, 2**40])
    chunks = (1 << 16,)
    return filled((length,), generator.choice(["<f4", "<i8", "<f8", "S1"]), chunks=chunks)


def bomb(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    dtype = generator.choice(["<f4", "<i8", "<f8"])
    zeros = np.zeros(1 << 20, dtype)
    group.create_dataset(name, data=zeros, compression="gzip", chunks=(1 << 18,))


def huge_chunk(generator: random.Random, group: h5py.Group, name: str, place: Place) -> Any:
    """A few values in a chunk of gigabytes, of which HDF5 makes room for all."""
    dtype = generator.choice(["<f4", "<i8", "<f8"])
    return filled((5,), dtype, chunks=(1 << 28,), maxshape=(None,), compression="gzip")


def virtual(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    source = generator.choice(["../../outside/secret.h5", str(place.outside / "fifo"), "."])
    layout = h5py.VirtualLayout((5,), "<f4", maxshape=(None,))
    layout[:] = h5py.VirtualSource(source, "tensor", (5,), "<f4", maxshape=(None,))[:]
    group.create_virtual_dataset(name, layout)


def elsewhere(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    source = generator.choice([place.outside / "secret.h5", place.outside / "fifo", "../new.bin"])
    dtype = generator.choice(["<f4", "<i8", "<f8"])
    group.create_dataset(name, (5,), dtype, external=[(str(source), 0, 5 * 8)])


def external_link(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    target = generator.choice(["../../outside/secret.h5", str(place.outside / "fifo"), "../x", "."])
    group[name] = h5py.ExternalLink(target, generator.choice(["/", "tensor"]))


def soft_link(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    group[name] = h5py.SoftLink(generator.choice(["/", ".", name, "/nothing", f"{group.name}"]))


def cycle(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    group[name] = generator.choice([group, group.file["/"]])


def group(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    group.create_group(name).create_group("deeper")


def reference(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    kind = generator.choice([h5py.ref_dtype, h5py.regionref_dtype])
    group.create_dataset(name, (3,), kind)


def named_type(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    group[name] = np.dtype(generator.choice(["<f4", "<i8"]))


def odd_type(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    made = [
        ((3,), np.dtype([("a", "<f4"), ("b", "<i8")])),
        ((3,), h5py.vlen_dtype("<f4")),
        ((1,), h5py.string_dtype()),
        ((3,), h5py.enum_dtype({"a": 1, "b": 2}, "i1")),
        ((3,), h5py.opaque_dtype("V5")),
        ((3,), np.dtype(("<f4", (2, 2)))),
    ]
    shape, dtype = generator.choice(made)
    group.create_dataset(name, shape, dtype)


def nothing(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    group[name] = h5py.Empty(generator.choice(["<f4", "<i8", "<f8", "S5"]))


def unknown_filter(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((5,))
    plan.set_filter(generator.choice([307, 32_000, 40_000]), h5py.h5z.FLAG_OPTIONAL, (1, 2))
    group.create_dataset(name, (5,), "<f4", dcpl=plan)


def other_filter(generator: random.Random, group: h5py.Group, name: str, place: Place) -> None:
    kind = generator.choice([{"compression": "lzf"}, {"scaleoffset": 4}])
    dtype = "<i8" if "scaleoffset" in kind else generator.choice(["<f4", "<f8"])
    group.create_dataset(name, data=np.zeros(5, dtype), **kind)
