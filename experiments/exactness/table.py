"""Studies side by side, as markdown.

python -m experiments.exactness.table runs/exactness/smooth_*
python -m experiments.exactness.table runs/exactness/ladder/*
python -m experiments.exactness.table --shares runs/exactness/smooth_adam
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Results = dict[str, Any]
TITLES = {
    "unrolled": "Unrolled",
    "late": "Unrolled, without the first step",
    "recorded_exact": "recorded order, exact curvature",
    "recorded": "recorded order",
    "recorded_blocks": "recorded order, blocks",
    "source_exact": "SOURCE, exact curvature",
    "source": "SOURCE",
    "source_blocks": "SOURCE, blocks",
    "influence_exact": "influence function, exact curvature",
    "influence": "influence function",
    "tracin": "TracIn",
}


def main() -> None:
    """One table for each thing that the studies measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="what study.py or ladder.py wrote")
    parser.add_argument("--shares", action="store_true", help="what shares.py found")
    parser.add_argument("--only", choices=TITLES, help="one estimator")
    options = parser.parse_args()
    folders = options.folders
    if options.shares:
        print_shares(folders)
        return
    found = [json.loads((folder / "results.json").read_text()) for folder in folders]
    if "config" not in found[0]:
        print_rungs([folder.name for folder in folders], found)
        return
    if options.only is not None:
        print_one(options.only, found)
        return
    print_table("LDS", found, lds)
    print_table("correlation with Unrolled's scores, slope", found, closeness)
    print_table("left out singly: correlation, slope", found, left_out)


def print_one(name: str, found: list[Results]) -> None:
    """One estimator: studies down."""
    print(f"| {TITLES[name]} | LDS | left out singly: correlation, slope | certificate |")
    print("|---|---|---|---|")
    for one in found:
        cells = [cell(one, name) for cell in (lds, left_out, certificate)]
        print(f"| {one['config']['name']} | {' | '.join(cells)} |")


def print_table(title: str, found: list[Results], cell: Callable[[Results, str], str]) -> None:
    """Estimators down, studies across."""
    print(f"\n| {title} | {' | '.join(one['config']['name'] for one in found)} |")
    print("|---" * (len(found) + 1) + "|")
    for name, words in TITLES.items():
        cells = [cell(one, name) for one in found]
        if any(cells):
            print(f"| {words} | {' | '.join(text or '-' for text in cells)} |")


def print_rungs(names: list[str], found: list[Results]) -> None:
    """Rungs down, ladders across: correlation with exact unrolling, and LDS."""
    print(f"| correlation with Unrolled, LDS | {' | '.join(names)} |")
    print("|---" * (len(found) + 1) + "|")
    longest = max(found, key=len)
    for rung in longest:
        cells = [
            f"{one[rung]['correlation']:.4f}, {one[rung]['lds'][0]:.3f}" if rung in one else "-"
            for one in found
        ]
        print(f"| {rung} | {' | '.join(cells)} |")


def print_shares(folders: list[Path]) -> None:
    """Shares down, studies across: LDS; correlation and slope of single examples."""
    found = [json.loads((folder / "shares.json").read_text()) for folder in folders]
    print(f"| share | {' | '.join(folder.name for folder in folders)} |")
    print("|---" * (len(found) + 1) + "|")
    for rows in zip(*found, strict=True):
        cells = [f"{row[1]:.3f}; {row[4]:.4f}, {row[5]:.3f}" for row in rows]
        print(f"| {rows[0][0]:g} | {' | '.join(cells)} |")


def lds(one: Results, name: str) -> str:
    """With its interval."""
    if name not in one["lds"]:
        return ""
    value, low, high = one["lds"][name]
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def closeness(one: Results, name: str) -> str:
    """Of the scores to exact ones."""
    if name not in one["closeness"] or name == "unrolled":
        return ""
    correlation, slope = one["closeness"][name]
    return f"{correlation:.3f}, {slope:.2f}"


def left_out(one: Results, name: str) -> str:
    """Against retraining without one example."""
    if name not in one["left_out"]:
        return ""
    slope, correlation = one["left_out"][name][:2]
    return f"{correlation:.4f}, {slope:.3f}"


def certificate(one: Results, name: str) -> str:
    """How the replay landed."""
    if name not in one["certificates"]:
        return ""
    made = one["certificates"][name]
    if made["bit_equal"]:
        return f"{made['checkpoints']} checkpoints, bit for bit"
    return f"{made['checkpoints']} checkpoints, to {made['relative_difference']:.1e}"


if __name__ == "__main__":
    main()
