"""Curvature statistics gathered during training, one file per interval between checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from tda_lightning.records.curvature_statistics import BlockStatistics, Statistics
from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.store import layout
from tda_lightning.store.hdf5 import (
    get_arrays,
    get_json,
    put_json,
    put_tensors,
    reading,
    subgroup,
    writing,
)
from tda_lightning.store.record_checks import require_statistics
from tda_lightning.store.untrusted import names, own_dataset

if TYPE_CHECKING:
    from torch import Tensor

_PACKED = "packed "  # before the name of a symmetric matrix that is stored as its lower triangle


@dataclass(frozen=True, eq=False)
class StatisticsFolder(Mapping[tuple[int, int], Statistics]):
    """The statistics of a trajectory by interval (start, stop), each read when asked for."""

    root: Path
    last_step: int

    def __getitem__(self, interval: tuple[int, int]) -> Statistics:
        path = self._files().get(interval)
        if path is None:
            raise KeyError(interval)
        with reading(path, layout.STATISTICS) as file:
            return {name: _block(facts, arrays) for name, facts, arrays in _read_blocks(file)}

    def check(self, interval: tuple[int, int]) -> tuple[float, int]:
        """Read a file without torch: how many examples its sums are over, and its blocks.

        Raises:
            TrajectoryFormatError: it is damaged.
        """
        with reading(self._files()[interval], layout.STATISTICS) as file:
            examples = [float(arrays["examples"][0]) for _, _, arrays in _read_blocks(file)]
        return max(examples, default=0.0), len(examples)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._files())

    def __len__(self) -> int:
        return len(self._files())

    def _files(self) -> dict[tuple[int, int], Path]:
        files = layout.statistics_files(self.root)
        finished = {
            interval: path for interval, path in files.items() if interval[1] <= self.last_step
        }
        covered = 0
        for start, stop in finished:
            if not covered <= start < stop:
                # Sums over both would count their steps twice.
                raise TrajectoryFormatError(
                    f"{finished[start, stop]} holds the statistics of steps {start + 1} to {stop}, "
                    f"expected steps after {covered}, where those before it end. Remove the file "
                    "that no recorder wrote, or record again."
                )
            covered = stop
        return finished


def write_statistics(root: Path, start: int, stop: int, statistics: Statistics) -> None:
    """Write the sums over the steps ``start`` < step <= ``stop``."""
    with writing(layout.statistics_file(root, start, stop), layout.STATISTICS) as file:
        blocks = {
            name: {"parameters": block.parameters, "shape": block.shape}
            for name, block in statistics.items()
        }
        put_json(file, layout.BLOCKS, blocks)
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
    import torch

    rows = [side[:, i, : i + 1] for i in range(side.shape[1])]
    return torch.cat(rows, dim=1)


def _unpacked(packed: np.ndarray, groups: int, width: int) -> np.ndarray:
    count = width * (width + 1) // 2
    # Checked before memory is allocated for it.
    if packed.shape != (groups, count):
        raise ValueError(
            f"the triangle of a matrix has shape {list(packed.shape)}, expected {[groups, count]}"
        )
    full, start = np.zeros((groups, width, width), packed.dtype), 0
    for i in range(width):
        full[:, i, : i + 1] = full[:, : i + 1, i] = packed[:, start : start + i + 1]
        start += i + 1
    return full


def _read_blocks(file: h5py.File) -> Iterator[tuple[str, Any, dict[str, np.ndarray]]]:
    """Name, facts and checked sums of each block."""
    blocks = get_json(file, layout.BLOCKS)
    require_statistics(blocks)
    for name, facts in blocks.items():
        yield name, facts, _read_block(subgroup(file, layout.encode(name)), facts["shape"])


def _block(facts: Any, arrays: Mapping[str, np.ndarray]) -> BlockStatistics:
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    groups, rows, columns = facts["shape"]
    return BlockStatistics(tuple(facts["parameters"]), (groups, rows, columns), **tensors)


def _read_block(group: h5py.Group, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    # They are written uncompressed, so that a tensor is no larger than its file.
    if packed := [n for n in names(group) if own_dataset(group, n).compression is not None]:
        raise ValueError(f"{packed[0]!r} in {group.name} is compressed")
    stored = get_arrays(group)
    tensors = {name: array for name, array in stored.items() if isinstance(array, np.ndarray)}
    if other := sorted(stored.keys() - tensors.keys()):
        raise ValueError(f"{other[0]!r} in {group.name} is of no dtype that sums have")
    groups, rows, columns = shape
    for name, width in (("left", rows), ("right", columns)):
        if (triangle := tensors.pop(_PACKED + name, None)) is not None:
            if name in tensors:
                raise ValueError(f"two kinds of side {name} in {group.name}")
            tensors[name] = _unpacked(triangle, groups, width)
        else:
            _check_side(name, tensors[name], groups, width)
    _check_values(tensors, groups)
    return tensors


def _check_side(name: str, side: np.ndarray, groups: int, width: int) -> None:
    """Check a diagonal, or a sketch: some products of the matrix and its diagonal."""
    shape = tuple(side.shape)
    sketch = len(shape) == 3 and 2 <= shape[2] < width
    if shape[:2] != (groups, width) or not (len(shape) == 2 or sketch):
        raise ValueError(f"side {name} has shape {list(shape)}, expected width {width}")


def _check_values(tensors: Mapping[str, np.ndarray], groups: int) -> None:
    if set(tensors) != set(BlockStatistics.SUMS):
        raise ValueError(f"a block of {sorted(tensors)}, expected {sorted(BlockStatistics.SUMS)}")
    for name, length in (("count", groups), ("trace", 1), ("examples", 1), ("samples", 2)):
        if tensors[name].shape != (length,):
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}, expected [{length}]")
    for name, tensor in tensors.items():
        if tensor.dtype not in (np.float32, np.float64) or tensor.dtype != tensors["left"].dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}")
        if not bool(np.isfinite(tensor).all()):
            raise ValueError(f"{name} is not all finite numbers")
        if bool((_squares(tensor) < 0).any()):
            raise ValueError(f"{name} is a sum of squares and has negative numbers")


def _squares(tensor: np.ndarray) -> np.ndarray:
    """The part of a count or of a side, in any form, that is a sum of squares."""
    if tensor.ndim < 3:
        return tensor
    square = tensor.shape[1] == tensor.shape[2]
    return np.diagonal(tensor, axis1=1, axis2=2) if square else tensor[..., -1]
