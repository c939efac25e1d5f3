"""How large an index will be, how long it takes to build and to search: measured on a sample."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.index.attribution_index import SHARD, AttributionIndex
from tda_lightning.index.build import shard_of
from tda_lightning.index.opened import sampled, training_source
from tda_lightning.index.search import search

_READ = 1 << 28  # bytes that are written and read to measure a disk
_SAMPLE = 512  # rows of the shards that are built
_SEARCHED = 1 << 15  # rows that are compared with a query


@dataclass(frozen=True)
class IndexPlan:
    """What an index is expected to take on this machine, or on several like it.

    Attributes:
        examples: in the index.
        row_bytes: of one example.
        shard_bytes: of a shard beside its rows.
        fixed_bytes: of what the index holds once, whatever its examples.
        shard: examples in a shard.
        begin_seconds: until the first example is written: curvature (0 where it is kept beside the
            run already), the choice of coordinates.
        example_seconds: gradients of one example at all checkpoints, compressed and written.
        read_bytes_per_second: of the disk, from front to back.
        multiply_bytes_per_second: rows in memory compared with one query, in one process.
        machines: that build and search together.
        price_per_hour: of one of them, if given.
    """

    examples: int
    row_bytes: int
    shard_bytes: int
    fixed_bytes: int
    shard: int
    begin_seconds: float
    example_seconds: float
    read_bytes_per_second: float
    multiply_bytes_per_second: float
    machines: int = 1
    price_per_hour: float | None = None

    @property
    def disk_bytes(self) -> int:
        """Size of the index."""
        shards = math.ceil(self.examples / self.shard)
        return self.examples * self.row_bytes + shards * self.shard_bytes + self.fixed_bytes

    @property
    def build_seconds(self) -> float:
        """Until all machines have written their parts."""
        return self.begin_seconds + self.examples * self.example_seconds / self.machines

    @property
    def build_price(self) -> float | None:
        """Of all machines for that time."""
        if self.price_per_hour is None:
            return None
        return self.machines * self.build_seconds / 3600 * self.price_per_hour

    @property
    def bytes_per_second(self) -> float:
        """That a search of one query goes through: reading and multiplying go on together, so the
        slower one counts."""
        return min(self.read_bytes_per_second, self.multiply_bytes_per_second)

    @property
    def search_seconds(self) -> float:
        """Of one query, without the gradient of the query itself."""
        return self.disk_bytes / self.bytes_per_second / self.machines

    @property
    def machines_for_a_second(self) -> int:
        """That search the index in one second together."""
        return math.ceil(self.disk_bytes / self.bytes_per_second)


def plan_index(
    attribution: AttributionModule,
    train: object,
    folder: Path,
    *,
    bytes_per_example: int = 1024,
    dtype: str | None = None,
    queries: object = None,
    batch_size: int = 256,
    examples: int | None = None,
    read_bytes_per_second: float | None = None,
    machines: int = 1,
    price_per_hour: float | None = None,
    trainer: Any = None,
) -> IndexPlan:
    """Build two shards of an index in a temporary folder, and measure.

    The run's curvature is fitted for that if it is not there yet, and stays beside the run, where
    the index will find it.

    Args:
        attribution, train, bytes_per_example, dtype, queries, batch_size, trainer: as in
            :meth:`AttributionIndex.build`.
        folder: on the disk that the index will be on.
        examples: number of examples to plan for; None: those of the training set.
        read_bytes_per_second: of the disk; None: measured in ``folder``.
        machines: that build and search together.
        price_per_hour: of one of them.

    Raises:
        ValueError: a number is not positive.
    """
    given = {"examples": examples, "machines": machines, "price_per_hour": price_per_hour}
    for name, value in {**given, "read_bytes_per_second": read_bytes_per_second}.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}.")
    source = training_source(attribution, train, batch_size)
    shard = min(_SAMPLE, max(1, len(source) // 2))
    parts = math.ceil(len(source) / shard)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".plan-") as temporary:
        root = Path(temporary)

        def seconds(part: int) -> float:
            began = time.perf_counter()
            AttributionIndex.build(
                attribution,
                source,
                root / "index",
                bytes_per_example=bytes_per_example,
                dtype=dtype,
                queries=queries,
                batch_size=batch_size,
                shard=shard,
                part=(part, parts),
                trainer=trainer,
            )
            return time.perf_counter() - began

        first, opened = seconds(1), seconds(1)  # the second time everything is there
        each = max(0.0, seconds(min(2, parts)) - opened) / shard if parts > 1 else first / shard
        index = AttributionIndex.open(root / "index", attribution, source)
        row_bytes = index.bytes_per_example
        files = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
        (one, *_) = [size for path, size in files.items() if path.parent.name == "shards"]
        fixed = sum(size for path, size in files.items() if path.parent.name != "shards")
        multiply = _multiplied(index, index.encode(sampled(source, [0])), shard)
        read = read_bytes_per_second or _read(root / "read")
    return IndexPlan(
        examples=len(source) if examples is None else examples,
        row_bytes=row_bytes,
        shard_bytes=one - shard * row_bytes,
        fixed_bytes=fixed,
        shard=SHARD,
        begin_seconds=max(0.0, first - each * shard),
        example_seconds=each,
        read_bytes_per_second=read,
        multiply_bytes_per_second=multiply,
        machines=machines,
        price_per_hour=price_per_hour,
    )


def _multiplied(index: AttributionIndex, asked: Tensor, rows: int) -> float:
    """Bytes of rows in memory that are compared with a query in a second."""
    own = shard_of(index.path, index.facts, 0, rows)
    repeated = [own] * max(1, _SEARCHED // rows)
    began = time.perf_counter()
    search(index.compression, asked, repeated, index.facts.dtype, 10, 1.0)
    return len(repeated) * rows * index.bytes_per_example / (time.perf_counter() - began)


def _read(path: Path) -> float:
    """Bytes a second that the disk of a file gives, written for that and dropped from memory."""
    block = os.urandom(1 << 20)
    with open(path, "wb") as file:
        for _ in range(_READ >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(1 << 24)
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return _READ / (time.perf_counter() - began)
