"""The table of ``README.md``, from the results that are kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments.models.run import ESTIMATORS, RESULTS

README = Path(__file__).parent / "README.md"
PEERS = Path(__file__).parent / "results_peers.json"
MARKS = ("<!-- table -->", "<!-- end of table -->")
PEERS_MARKS = ("<!-- peers -->", "<!-- end of peers -->")


def table() -> str:
    heads = (
        "model",
        "adapter",
        "trained of",
        "largest error",
        "checkpoint",
        *ESTIMATORS,
        "peak memory",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for path in sorted(RESULTS.glob("*.json")):
        row = json.loads(path.read_text())
        times = [row[name]["seconds"] / row["epoch_seconds"] for name in ESTIMATORS]
        peak = max(row[name]["peak_bytes"] for name in ESTIMATORS) / 2**20
        cells = [
            row["model"],
            row["adapter"],
            f"{row['trained']:,} of {row['parameters']:,}",
            f"{row['error']:.0e}",
            f"{row['checkpoint_bytes'] / 1000:.0f} kB",
            *(f"{value:.0f}" for value in times),
            f"{peak:.0f} MiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def peers() -> str:
    """Time and LDS of the rows of ``peers.py``."""
    lines = ["| | processor seconds | LDS |", "|---|---|---|"]
    for title, row in json.loads(PEERS.read_text()).items():
        lds = "" if "lds" not in row else "{:.3f} [{:.3f}, {:.3f}]".format(*row["lds"])
        lines.append(f"| {title} | {row['seconds']:.2f} | {lds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the README")
    if not parser.parse_args().write:
        print(table(), peers(), sep="\n\n")
        return
    text = README.read_text()
    for (begin, end), block in ((MARKS, table()), (PEERS_MARKS, peers())):
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}\n{block}\n{end}{after}"
    README.write_text(text)


if __name__ == "__main__":
    main()
