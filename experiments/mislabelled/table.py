"""README's tables and figures, from the stored results.

python -m experiments.mislabelled.table

Nothing is trained or scored, and no data are needed. (The pictures of proponents.svg come from
run.py, which has the data.)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from experiments.marked import with_block
from experiments.mislabelled.edits import ACTIVATIONS
from experiments.mislabelled.figures import lines, scatter
from experiments.mislabelled.mending import COMPARED, LOOKED
from experiments.mislabelled.proponents import TITLES as WAYS
from experiments.mislabelled.ranking import TITLES
from experiments.mislabelled.setting import FLIPPED
from tda_lightning.evaluation.linear_datamodeling import bootstrap
from tda_lightning.store.atomic_write import write_text

HERE = Path(__file__).parent
NETWORKS = {"relu": "ReLU", "gelu": "GELU"}
Results = dict[str, Any]


def main() -> None:
    """:func:`publish`, as a command."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    publish()


def publish() -> None:
    """Write the tables into README.md and the figures beside the results, and print the tables."""
    results = read()
    text = (HERE / "README.md").read_text()
    for name, block in blocks(results).items():
        print(f"{block}\n")
        text = with_block(text, name, block)
    write_text(HERE / "README.md", text)
    for name, drawing in figures(results).items():
        write_text(HERE / "results" / name, drawing)


def read() -> Results:
    """What run.py wrote."""
    found: Results = json.loads((HERE / "results" / "results.json").read_text())
    return found


def blocks(results: Results) -> dict[str, str]:
    """Every table, by its mark in README.md."""
    return {
        "run": recorded(results),
        "finding": finding(results),
        "mending": mending(results),
        "edits": edits(results),
        "proponents": proponents(results),
    }


def figures(results: Results) -> dict[str, str]:
    """Every drawing that needs no data, by file."""
    curves = {
        title: [
            100 * mean([one["mending"][f"{name} mend {share:g}"] for one in results["seeds"]])
            for share in LOOKED
        ]
        for name, title in TITLES.items()
    }
    levels = {
        words: 100 * mean([one["mending"][name] for one in results["seeds"]])
        for name, words in (("as it is", "as it is"), ("all mend", "every wrong label mended"))
    }
    found = results["seeds"][0]["edits"]["gelu"]
    return {
        "mending.svg": lines(
            [100 * share for share in LOOKED],
            curves,
            levels,
            "% of the training set looked through",
            "test accuracy, %",
        ),
        "edits.svg": scatter(
            found["predicted"],
            found["measured"],
            "predicted change of the mean test loss",
            "measured change",
        ),
    }


def recorded(results: Results) -> str:
    """What the recorded runs are like."""
    names = {
        "test": "test accuracy",
        "training labels": "training labels fitted",
        "flipped labels learned": "flipped labels fitted",
    }
    head = f"| recorded runs | {' | '.join(names.values())} |\n{'|---' * (len(names) + 1)}|"
    cells = [spread([100 * one["recorded"][name] for one in results["seeds"]], 1) for name in names]
    return f"{head}\n| % | {' | '.join(cells)} |"


def finding(results: Results) -> str:
    """How well each ranking finds the flipped labels."""
    keys = ["auc", *(f"within {share:g}" for share in LOOKED)]
    titles = ["AUC", *(f"found within {share:.0%}" for share in LOOKED), "seconds"]
    rows = [f"| ranking | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, title in TITLES.items():
        found = [one["finding"][name] for one in results["seeds"]]
        cells = [spread([item[key] for item in found], 3) for key in keys]
        cells.append(f"{mean([one['seconds'][name] for one in results['seeds']]):.1f}")
        rows.append(f"| {title} | {' | '.join(cells)} |")
    perfect = [f"{min(1.0, share / FLIPPED):.3f}" for share in LOOKED]
    return "\n".join([*rows, f"| every wrong label first | 1.000 | {' | '.join(perfect)} | |"])


def mending(results: Results) -> str:
    """What looking gains, in points of test accuracy over doing nothing."""

    def gain(name: str) -> str:
        changes = [
            100 * (one["mending"][name] - one["mending"]["as it is"]) for one in results["seeds"]
        ]
        return spread(changes, 2, signed=True)

    titles = [
        *(f"mend, {share:.0%} looked at" for share in LOOKED),
        f"remove the wrong ones, {COMPARED:.0%}",
        f"remove all, unseen, {COMPARED:.0%}",
    ]
    rows = [f"| gain | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, title in TITLES.items():
        cells = [gain(f"{name} mend {share:g}") for share in LOOKED]
        cells += [gain(f"{name} {how} {COMPARED:g}") for how in ("remove", "remove unseen")]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    empty = " |" * (len(LOOKED) - 2)
    rows.append(
        f"| every wrong label alone | | {gain('all mend')} |{empty} {gain('all remove')} | |"
    )
    base = spread([100 * one["mending"]["as it is"] for one in results["seeds"]], 2)
    return "\n".join([*rows, "", f"Without looking: {base} % right."])


def edits(results: Results) -> str:
    """Predicted against measured changes."""
    found = results["seeds"][0]["edits"]
    rows = [
        "| network | correlation | rank correlation | slope | typical change, measured | "
        "predicted | by the nudge |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ACTIVATIONS:
        one = found[name]
        predicted, measured = (
            torch.tensor(one[key], dtype=torch.float64) for key in ("predicted", "measured")
        )
        slope = float((predicted * measured).sum() / predicted.square().sum())
        correlation = float(torch.corrcoef(torch.stack([predicted, measured]))[0, 1])
        rank = float(spearmanr(predicted.numpy(), measured.numpy()).statistic)
        sizes = [float(item.square().mean().sqrt()) for item in (measured, predicted)]
        cells = [f"{correlation:.3f}", f"{rank:.3f}", f"{slope:.2f}"]
        cells += [f"{size:.1e}" for size in (*sizes, abs(one["nudged"]))]
        rows.append(f"| {NETWORKS[name]} | {' | '.join(cells)} |")
    count, flipped = len(found["was flipped"]), sum(found["was flipped"])
    right = sum(found["proposal is right"])
    return "\n".join(
        [
            *rows,
            "",
            f"Of the {count} labels {flipped} were flipped, and for {right} the proposed class is "
            "the right one.",
        ]
    )


def proponents(results: Results) -> str:
    """Shares among the ten top proponents of wrong predictions."""
    found = results["seeds"][0]["proponents"]
    rows = [
        "| ten top proponents of a wrong prediction | label flipped | labelled as predicted |",
        "|---|---|---|",
    ]
    for name, title in WAYS.items():
        cells = [
            str(bootstrap(torch.tensor(found[name][key])))
            for key in ("flipped", "labelled as predicted")
        ]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*rows, f"| any training picture | {FLIPPED:.3f} | about 0.1 |"])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], digits: int, signed: bool = False) -> str:
    """Mean over seeds, lowest and highest."""
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    middle, low, high = (form.format(value) for value in (mean(values), min(values), max(values)))
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    main()
