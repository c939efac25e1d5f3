"""How fast rows of an index are read and searched, on this machine.

python -m experiments.index_scale.run FOLDER                # on the disk to be measured, 4 GiB

Shards of the true size of an index at 1 KiB an example are written to FOLDER: random rows that
repeat every 64 MiB, which changes nothing in the time. Then, in this order, repeated and with
medians: reading alone, from the disk (the system's cache is dropped for these files) and from
memory; multiplying alone, rows in memory; the search, from the disk and from memory. Times are of
the clock where the disk is asked, of the processor where it is not. Writes results/rates.json,
from which table.py makes the tables of the README.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.index_scale.part import chunks
from experiments.index_scale.scan import scan
from tda_lightning.index.rounding import rounded, width_of
from tda_lightning.store.index_files import write_shard
from tda_lightning.store.layout import shard_file

RESULTS = Path(__file__).parent / "results"
EXAMPLE = 1024  # bytes
REPEATED = 1 << 26  # bytes after which rows repeat
KINDS = ("int8", "float16")
QUERIES = (1, 8, 64)
K = 10


def main() -> None:
    """Measure, and keep the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the shards, which are removed at the end")
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in KINDS:
        paths = written(options.folder, name, int(options.gib * (1 << 30)), options.shards)
        try:
            rows += measured(options.folder, paths, name, options.repeats)
        finally:
            for path in paths:
                path.unlink()
    found = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "gib": options.gib,
        "shards": options.shards,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rates.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def written(folder: Path, dtype: str, size: int, count: int) -> list[Path]:
    """Shards of about ``size`` bytes in all, of random rows."""
    rows = REPEATED // EXAMPLE
    width = width_of(EXAMPLE, dtype)
    block = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    codes, scales = rounded(block, dtype)
    repeats = max(1, size // count // REPEATED)
    paths = []
    for number in range(count):
        first = number * repeats * rows
        write_shard(folder, first, np.tile(codes, (repeats, 1)), np.tile(scales, repeats), "")
        paths.append(shard_file(folder, first, first + repeats * rows))
        with open(paths[-1], "rb") as file:
            os.fsync(file.fileno())
    return paths


def measured(folder: Path, paths: list[Path], name: str, repeats: int) -> list[dict[str, Any]]:
    """Rates in 1e9 bytes a second, of the clock and of the processor."""
    width, size = width_of(EXAMPLE, name), sum(path.stat().st_size for path in paths)
    generator = torch.Generator().manual_seed(1)
    rows = []

    def note(what: str, queries: int, cold: bool, work: Callable[[], object], size: int) -> None:
        clock, processor = [], []
        for _ in range(repeats):
            if cold:
                forget(paths)
            began, worked = time.perf_counter(), time.process_time()
            work()
            processor.append(size / (time.process_time() - worked) / 1e9)
            clock.append(size / (time.perf_counter() - began) / 1e9)
        rows.append(
            {"kind": name, "what": what, "queries": queries, "cold": cold}
            | {"clock": clock, "processor": processor}
        )
        print(
            f"{name} {what} Q={queries} {'disk' if cold else 'memory'}: "
            f"{statistics.median(clock):.2f} GB/s, {statistics.median(processor):.2f} GB a "
            "processor second",
            flush=True,
        )

    for cold in (True, False):
        note("read", 0, cold, lambda: read(paths), size)
    held = [
        (first, own.clone(), scales)
        for first, own, scales in itertools.islice(chunks(str(folder), 1, 1), 8)
    ]
    held *= 4  # the first chunks put much among the strongest, later ones little
    held_size = sum(len(own) for _, own, _ in held) * EXAMPLE
    for count in QUERIES:
        queries = torch.randn(count, width, generator=generator)
        note("multiply", count, False, lambda q=queries: scan(held, q, K), held_size)
        for cold in (True, False):
            note(
                "search",
                count,
                cold,
                lambda q=queries: scan(chunks(str(folder), 1, 1), q, K),
                size,
            )
    return rows


def read(paths: list[Path]) -> None:
    """All bytes, one file after another."""
    buffer = bytearray(1 << 24)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(paths: list[Path]) -> None:
    """Drop what the system keeps of these files in memory."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
