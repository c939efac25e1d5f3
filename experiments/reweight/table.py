"""The tables of the README, from the kept results.

python -m experiments.reweight.table            # print
python -m experiments.reweight.table --write    # and put them into README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.fastif.kept import interval
from experiments.marked import with_block
from experiments.reweight.orders import ORDERS, SOURCES
from experiments.reweight.run import RESULTS
from tda_lightning.evaluation.linear_datamodeling import rank_correlation

README = Path(__file__).parent / "README.md"
MODELS = {"equal": "equal", "balanced": "balanced by words", "scores": "from scores, rate 0.5"}
CHANGES = {"balanced": "balanced by words", "0.1": "from scores, rate 0.1", "0.5": "rate 0.5"}


def main() -> None:
    """Print the tables; write them where the README has them."""
    parser = argparse.ArgumentParser(description="The tables, from the kept results.")
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    write = parser.parse_args().write
    for part, make in (("words", words_block), ("orders", orders_block)):
        results = load(part)
        if not results:
            continue
        text = make(results)
        print(text, end="\n\n")
        if write:
            README.write_text(with_block(README.read_text(), part, text))


def load(part: str) -> list[dict[str, Any]]:
    """The results of all seeds."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{part}-[0-9]*.json"))]


def words_block(results: Sequence[dict[str, Any]]) -> str:
    """Part (a)."""
    data = json.loads((RESULTS / "words-data.json").read_text())
    lines = [
        f"{data['train']} training pairs, {data['words']} words. Mean correlation of a word "
        f"with the label {data['mean_before']:.4f} at equal weights, {data['mean_after']:.4f} at "
        f"balanced ones (largest {data['largest_before']:.3f}, {data['largest_after']:.3f}); "
        "weights up to "
        f"{data['largest_weight']:.1f}, {data['zero']} of them 0, worth {data['effective']:.0f} "
        f"pairs of equal weight. {data['test']} test pairs, {data['against']} against the words; "
        f"target of the scores: {data['target']} others against the words. {len(results)} seeds.",
        "",
        "| weights | mean correlation | accuracy | with words | against | difference of the two "
        "| margin follows words |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shown in MODELS.items():
        own = [one["models"][name] for one in results]
        left = [one["imbalance"].get(name, data["mean_before"]) for one in results]
        # Balanced weights are made from the data alone, the same for every seed.
        cells = [f"{left[0]:.4f}" if len({*left}) == 1 else over_seeds(left, digits=4)]
        gaps = [{**row, "gap": row["with"] - row["against"]} for row in own]
        cells += [
            over_seeds([row[key] for row in gaps])
            for key in ("accuracy", "with", "against", "gap", "follows")
        ]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    lines += [
        "",
        "Predicted against true change of the target's mean loss, the recorded run trained again:",
        "",
        "| weights | predicted | true | correlation over the target's pairs |",
        "|---|---|---|---|",
    ]
    for name, shown in CHANGES.items():
        own = [row for one in results for row in one["changes"] if row["weights"] == name]
        cells = [
            over_seeds([row[key] for row in own]) for key in ("predicted", "true", "correlation")
        ]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def orders_block(results: Sequence[dict[str, Any]]) -> str:
    """Part (b)."""
    losses = torch.tensor([one["losses"] for one in results], dtype=torch.float64)
    predicted = torch.tensor([one["predicted"] for one in results], dtype=torch.float64)
    lines = [
        f"{len(results)} seeds.",
        "",
        "| order | predicted, relative to the mean of the orders | loss of the target |",
        "|---|---|---|",
    ]
    relative = predicted - predicted.mean(1, keepdim=True)
    for place, order in enumerate(ORDERS):
        name = ", ".join(SOURCES[source] for source in order)
        cells = (over_seeds(part[:, place].tolist()) for part in (relative, losses))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    mixed = over_seeds([one["mixed"] for one in results])
    lines.append(f"| shuffled together | - | {mixed} |")
    each = rank_correlation(predicted, losses)
    mean = float(rank_correlation(predicted.mean(0)[None], losses.mean(0)[None])[0])
    lines += [
        "",
        "Spearman correlation of predicted and true over the six orders: "
        f"{over_seeds(each.tolist())} over seeds, {mean:.2f} of their means.",
    ]
    return "\n".join(lines)


def over_seeds(values: Sequence[float], digits: int = 3) -> str:
    """The mean and its interval over seeds."""
    mean, low, high = (
        f"{value:.{digits}f}" for value in interval(torch.tensor(values, dtype=torch.float64))
    )
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
