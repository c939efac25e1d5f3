"""The table of the README, from the kept results.

python -m experiments.distributional.table            # print
python -m experiments.distributional.table --write    # and put it into README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.distributional.run import FLIPPED, MEMBERS, NUM_QUERY, NUM_TRAIN, RESULTS, TOP
from experiments.marked import with_block
from tda_lightning.evaluation.linear_datamodeling import bootstrap

README = Path(__file__).parent / "README.md"
ORDER = ("one run", "mean", "mean / standard deviation", "Wasserstein", "variance")
HEADS = (
    "ranked by",
    "AUC of wrong labels",
    "help in an unseen run",
    "in its strongest",
    "strength",
)


def main() -> None:
    """Print the table; write it where the README has it."""
    parser = argparse.ArgumentParser(description="The table, from the kept results.")
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("draw-*.json"))]
    text = block(results)
    print(text)
    if parser.parse_args().write:
        README.write_text(with_block(README.read_text(), "table", text))


def block(results: Sequence[dict[str, Any]]) -> str:
    """What was measured, in Markdown."""
    lines = [
        f"{len(results)} training sets of {NUM_TRAIN} digits, {FLIPPED:.0%} of the labels wrong, "
        f"{MEMBERS} runs on each, {NUM_QUERY} queries; five runs rank, the other five judge, and "
        f"the other way round; the first {TOP} of a query.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{'---|' * len(HEADS)}",
    ]
    names = [*ORDER, *(name for name in results[0] if name not in ORDER)]
    for name in names:
        own = [result[name] for result in results]
        aucs = torch.tensor([value for part in own for value in part["auc"]])
        cells = [f"{float(aucs.mean()):.4f} ({float(aucs.min()):.4f} to {float(aucs.max()):.4f})"]
        for key in ("positive", "shared", "kept"):
            cells.append(str(bootstrap(torch.tensor([v for part in own for v in part[key]]))))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
