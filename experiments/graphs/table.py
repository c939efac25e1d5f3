"""The README's table of unlearning, from the kept results.

python -m experiments.graphs.table --write
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
    found = json.loads((HERE / "results" / "unlearning.json").read_text(encoding="utf-8"))
    table = unlearning(found["rows"])
    if not options.write:
        print(table)
        return
    readme = HERE / "README.md"
    write_text(readme, with_block(readme.read_text(encoding="utf-8"), "unlearning", table))


def unlearning(rows: list[dict[str, Any]]) -> str:
    """One line for each request."""
    lines = [
        "| model | removed | recovered | without the graph's part | test accuracy | "
        "membership | speedup |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        measures = row["measures"]
        accuracy = " / ".join(f"{value:.3f}" for value in measures["test accuracy"])
        member = measures.get("membership of the removed")
        membership = "" if member is None else " / ".join(f"{value:.2f}" for value in member)
        lines.append(
            f"| {row['model']} | {row['share']:.0%} of {row['what']} | {row['recovered']:.2f} | "
            f"{row[_WITHOUT]:.2f} | {accuracy} | {membership} | {row['speedup']:.2f} |"
        )
    return "\n".join(lines)


_WITHOUT = "recovered without the graph's part"

if __name__ == "__main__":
    main()
