"""The README's tables of an index of 10^9 examples, from the kept rates.

python -m experiments.index_scale.table --write
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from experiments.marked import with_block
from tda_lightning.runtime.formatting import readable_time
from tda_lightning.store.atomic_write import write_text

HERE = Path(__file__).parent
BYTES = 10**9 * 1024  # of 10^9 examples at 1 KiB
# What a machine may read from front to back, in 1e9 bytes a second: stated, not measured.
READERS = {"one NVMe drive": 3.0, "four NVMe drives": 12.0, "a network of 25 Gbit/s": 3.0}
CORES = 16

Rows = list[dict[str, Any]]


def main() -> None:
    """Print the tables, or write them into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the README")
    options = parser.parse_args()
    found = json.loads((HERE / "results" / "rates.json").read_text(encoding="utf-8"))
    tables = {"rates": rates(found["rows"]), "machines": machines(found["rows"])}
    if not options.write:
        print("\n\n".join(tables.values()))
        return
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = with_block(text, name, table)
    write_text(readme, text)


def rates(rows: Rows) -> str:
    """One line for each kind of rows and number of queries: medians and ranges."""
    lines = [
        "| rows | queries | read, from the disk | multiply, a processor second | search, a "
        "processor second | search from the disk, by the clock |",
        "|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        read = of(rows, kind, "read", 0, True)["clock"]
        for queries in sorted({row["queries"] for row in rows} - {0}):
            cells = (
                read,
                of(rows, kind, "multiply", queries, False)["processor"],
                of(rows, kind, "search", queries, False)["processor"],
                of(rows, kind, "search", queries, True)["clock"],
            )
            lines.append(f"| {kind} | {queries} | " + " | ".join(map(spread, cells)) + " |")
    return "\n".join(lines)


def machines(rows: Rows) -> str:
    """For each way to read, how many machines search 10^9 examples in a second."""
    lines = [
        f"| a machine of {CORES} cores reads from | GB/s | alone, 1 query | machines for a second, "
        "1 query | 8 queries together | 64 queries together |",
        "|---|---|---|---|---|---|",
    ]
    kind = rows[0]["kind"]
    measured = statistics.median(of(rows, kind, "read", 0, True)["clock"])
    for name, rate in {"the disk measured here": measured, **READERS}.items():
        cells = []
        for queries in (1, 8, 64):
            each = statistics.median(of(rows, kind, "search", queries, False)["processor"])
            bound = min(rate, CORES * each)
            by = "" if rate <= CORES * each else " (processor)"
            if queries == 1:
                cells.append(readable_time(BYTES / bound / 1e9))
            cells.append(f"{math.ceil(BYTES / bound / 1e9):,}{by}")
        lines.append(f"| {name} | {rate:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of(rows: Rows, kind: str, what: str, queries: int, cold: bool) -> dict[str, Any]:
    """The line of the results."""
    (found,) = [
        row
        for row in rows
        if (row["kind"], row["what"], row["queries"], row["cold"]) == (kind, what, queries, cold)
    ]
    return found


def spread(values: list[float]) -> str:
    """Median, and the range of all repetitions."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) GB/s"


if __name__ == "__main__":
    main()
