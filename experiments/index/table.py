"""The table of README.md from the kept results.

python -m experiments.index.table            # print it
python -m experiments.index.table --write    # put it into README.md
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE / "README.md"
_TITLES = {
    "factors": "factor pairs",
    "leading": "leading coordinates",
    "plain": "factor pairs alone",
    "random": "random projection",
}


def table(name: str) -> str:
    """The rows of one run and estimator."""
    found = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    if "cells" in found:
        return _cells(found)
    lds = "lds" in found
    lines = [
        f"| bytes | kept | agreement |{' LDS |' if lds else ''} recall@10 | of 100 | recall@100 |"
        " of 1000 |",
        "|---|---|---|" + "---|" * (5 if lds else 4),
        f"| all | uncompressed | 1 |{_lds(found)} 1 | 1 | 1 | 1 |",
    ]
    for row in sorted(found["rows"], key=lambda row: (-row["key"][0], -row["agreement"])):
        size, kind, dtype = row["key"]
        recalls = [f"{row[f'{how}recall_{k}']:.2f}" for k in (10, 100) for how in ("", "reranked_")]
        lines.append(
            f"| {size} | {_TITLES[kind]}, {dtype} | {_with_error(row, 'agreement')} |"
            f"{_lds(row)} {' | '.join(recalls)} |"
        )
    return "\n".join(lines)


def _cells(found: dict[str, Any]) -> str:
    """FAISS's search by how many cells are looked into."""
    lines = [
        f"| cells of {found['cells']} | recall@10, proponents | opponents | ms a query |",
        "|---|---|---|---|",
        f"| all rows, {found['queries']} queries together | 1 | 1 | "
        f"{1000 * found['exact_seconds']:.2f} |",
    ]
    if "exact_alone_seconds" in found:
        alone = 1000 * found["exact_alone_seconds"]
        lines.append(f"| all rows, one query at a time | 1 | 1 | {alone:.2f} |")
    for row in found["rows"]:
        proponents, opponents = row["recall"]
        spent = f"{1000 * row['seconds']:.2f}"
        lines.append(f"| {row['probes']} | {proponents:.2f} | {opponents:.2f} | {spent} |")
    return "\n".join(lines)


def _lds(row: dict[str, float]) -> str:
    return f" {_with_error(row, 'lds')} |" if "lds" in row else ""


def _with_error(row: dict[str, float], name: str) -> str:
    return f"{row[name]:.3f} ± {row[f'{name}_error']:.3f}"


def written(text: str) -> str:
    """The text with every table between its marks made anew."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{table(match[2])}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    made = written(README.read_text(encoding="utf-8"))
    if "--write" in sys.argv[1:]:
        README.write_text(made, encoding="utf-8")
    else:
        print(made)
