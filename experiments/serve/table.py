"""The README's table of clients at a service, from the kept results.

python -m experiments.serve.table --write
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.marked import with_block
from tda_lightning.store.atomic_write import write_text

HERE = Path(__file__).parent


def main() -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the README")
    options = parser.parse_args()
    found = json.loads((HERE / "results" / "load.json").read_text(encoding="utf-8"))
    table = load_table(found["rows"])
    if not options.write:
        print(table)
        return
    readme = HERE / "README.md"
    write_text(readme, with_block(readme.read_text(encoding="utf-8"), "load", table))


def load_table(rows: list[dict[str, Any]]) -> str:
    """One line for each number of clients, with and without batches."""
    lines = [
        "| clients | searched together | walks over the store | processor seconds a search | "
        "searches a second | median wait | p95 wait |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        together = f"up to {row['batch']}" if row["batch"] > 1 else "no"
        each = row["processor_seconds"] / row["searches"]
        rate = row["searches"] / row["seconds"]
        lines.append(
            f"| {row['clients']} | {together} | {row['walks']} for {row['searches']} | "
            f"{each:.4f} | {rate:.1f} | {row['median']:.3f} s | {row['p95']:.3f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
