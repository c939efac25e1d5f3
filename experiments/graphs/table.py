"""The README's tables, from the kept results.

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
    """Print the tables, and write them into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the README")
    options = parser.parse_args()
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for name, make in TABLES.items():
        path = HERE / "results" / f"{name}.json"
        if not path.exists():
            continue
        table = make(json.loads(path.read_text(encoding="utf-8")))
        print(table, end="\n\n")
        text = with_block(text, name, table)
    if options.write:
        write_text(HERE / "README.md", text)


def sgc(found: dict[str, Any]) -> str:
    """One line for edges and one for nodes, of each comparison."""
    lines = ["| removed | compared | Pearson | Spearman | slope |", "|---|---|---|---|---|"]
    for kind in ("edges", "nodes"):
        own = found[kind]
        for name in (
            "whole",
            "by way of the weights",
            "without the direct term, against the whole",
        ):
            values = own[name]
            lines.append(
                f"| {own['count']} {kind} | {name} | {values['pearson']:.3f} | "
                f"{values['spearman']:.3f} | {values['slope']:.2f} |"
            )
    return "\n".join(lines)


def steps(found: dict[str, Any]) -> str:
    """One line for each model, length of training and request."""
    lines = [
        "| model | steps | removed | negative curvature | lengths: step / fresh / warm | "
        "trained on without an edit | cosine: fresh / warm | best scale | "
        "objective: before / step / fresh / warm |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lengths, step, objective = row["lengths"], row["unlearning"], row["objective"]
        size = [lengths[name] for name in ("unlearning", "fresh", "warm")]
        cosine = [step[name]["cosine"] for name in ("fresh", "warm, less training on")]
        reached = [objective[name] for name in ("before", "unlearning", "fresh", "warm")]
        lines.append(
            f"| {row['model']} | {row['steps']} | {row['removed']} | "
            f"{row['negative eigenvalues']} | {_joined(size, '.2g')} | "
            f"{lengths['unedited']:.2g} | {_joined(cosine, '.2f')} | "
            f"{step['fresh']['best scale']:.2f} | {_joined(reached, '.3f')} |"
        )
    return "\n".join(lines)


def attack(found: dict[str, Any]) -> str:
    """How well the added edges are found, and what removing and unlearning them is worth."""
    lines = ["| ranked by | AUC | precision |", "|---|---|---|"]
    for name, own in found["found"].items():
        lines.append(f"| {name} | {own['auc']:.3f} | {own['precision']:.2f} |")
    lines += ["", "| weights and graph | test accuracy |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in found["test accuracy"].items()]
    return "\n".join(lines)


def speed(found: dict[str, Any]) -> str:
    """One line."""
    return f"{found['edges']} edges: {found['processor']:.0f} s of processor."


def _joined(values: list[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)


def unlearning(found: dict[str, Any]) -> str:
    """One line for each request."""
    lines = [
        "| model | removed | recovered | without the graph's part | test accuracy | "
        "membership | speedup |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        measures = row["measures"]
        accuracy = " / ".join(f"{value:.3f}" for value in measures["test accuracy"])
        member = measures.get("membership of the removed")
        membership = "" if member is None else " / ".join(f"{value:.2f}" for value in member)
        lines.append(
            f"| {row['model']} | {row['share']:.0%} of {row['what']} | {row['recovered']:.2f} | "
            f"{row[_WITHOUT]:.2f} | {accuracy} | {membership} | {row['speedup']:.2f} |"
        )
    return "\n".join(lines)


TABLES = {"sgc": sgc, "unlearning": unlearning, "steps": steps, "attack": attack, "speed": speed}
_WITHOUT = "recovered without the graph's part"

if __name__ == "__main__":
    main()
