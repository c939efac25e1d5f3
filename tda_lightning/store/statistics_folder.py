"""Curvature statistics gathered in training, one file for each interval between checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from tda_lightning.store import layout
from tda_lightning.store.h5 import (
    get_json,
    get_tensors,
    put_json,
    put_tensors,
    reading,
    subgroup,
    writing,
)
from tda_lightning.trajectory import BlockStatistics, Statistics

_PACKED = "packed "  # before the name of a symmetric matrix of which the lower triangle is kept


@dataclass(frozen=True, eq=False)
class StatisticsFolder(Mapping[tuple[int, int], Statistics]):
    """The statistics of a trajectory by interval (start, stop), each read when asked for."""

    root: Path
    last_step: int

    def __getitem__(self, interval: tuple[int, int]) -> Statistics:
        path = self._files().get(interval)
        if path is None:
            raise KeyError(interval)
        with reading(path, "statistics") as file:
            return {
                str(name): _read_block(subgroup(file, layout.encode(name)), about)
                for name, about in get_json(file, layout.BLOCKS).items()
            }

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._files())

    def __len__(self) -> int:
        return len(self._files())

    def _files(self) -> dict[tuple[int, int], Path]:
        files = layout.statistics_files(self.root)
        return {interval: path for interval, path in files.items() if interval[1] <= self.last_step}


def write_statistics(root: Path, start: int, stop: int, statistics: Statistics) -> None:
    """Keep the sums of the steps ``start`` < step <= ``stop``."""
    with writing(layout.statistics_file(root, start, stop), "statistics") as file:
        about = {
            name: {"parameters": block.parameters, "shape": block.shape}
            for name, block in statistics.items()
        }
        put_json(file, layout.BLOCKS, about)
        for key, block in statistics.items():
            group = file.create_group(layout.encode(key))
            put_tensors(
                group, {n: getattr(block, n) for n in ("count", "trace", "examples", "samples")}
            )
            for side in ("left", "right"):
                put_side(group, side, getattr(block, side))


def put_side(group: h5py.Group, name: str, side: Tensor) -> None:
    """Store a side; of a symmetric matrix its lower triangle, row by row, is enough."""
    square = side.dim() == 3 and side.shape[1] == side.shape[2]
    put_tensors(group, {_PACKED + name: _packed(side)} if square else {name: side})


def _packed(side: Tensor) -> Tensor:
    rows = [side[:, i, : i + 1] for i in range(side.shape[1])]
    return torch.cat(rows, dim=1)


def _unpacked(packed: Tensor) -> Tensor:
    groups, count = packed.shape
    width = int(((8 * count + 1) ** 0.5 - 1) / 2)
    if width * (width + 1) // 2 != count:
        raise ValueError(f"{count} numbers are no triangle of a matrix")
    full, start = packed.new_zeros(groups, width, width), 0
    for i in range(width):
        full[:, i, : i + 1] = full[:, : i + 1, i] = packed[:, start : start + i + 1]
        start += i + 1
    return full


def _read_block(group: h5py.Group, about: Mapping[str, object]) -> BlockStatistics:
    tensors = get_tensors(group)
    for name in ("left", "right"):
        if (packed := tensors.pop(_PACKED + name, None)) is not None:
            if packed.dim() != 2:
                raise ValueError(f"side {name} has shape {list(packed.shape)}")
            tensors[name] = _unpacked(packed)
    parameters, shape = about["parameters"], about["shape"]
    if not isinstance(parameters, list) or not isinstance(shape, list) or len(shape) != 3:
        raise ValueError(f"a block of {parameters} with shape {shape}")
    groups, rows, columns = (int(length) for length in shape)
    _check(tensors, groups, rows, columns)
    return BlockStatistics(
        tuple(map(str, parameters)),
        (groups, rows, columns),
        **{name: tensors[name] for name in BlockStatistics.SUMS},
    )


def _check(tensors: Mapping[str, Tensor], groups: int, rows: int, columns: int) -> None:
    for name, width in (("left", rows), ("right", columns)):
        side = tensors[name]
        if side.dim() not in (2, 3) or tuple(side.shape[:2]) != (groups, width):
            raise ValueError(f"side {name} has shape {list(side.shape)}, expected width {width}")
    for name, length in (("count", groups), ("trace", 1), ("examples", 1), ("samples", 2)):
        if tuple(tensors[name].shape) != (length,):
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}, expected [{length}]")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not np.isfinite(float(tensor.double().sum())):
            raise ValueError(f"{name} is not all finite numbers")
