"""The README's tables, from the kept results.

python -m experiments.graphs.table --write
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

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
    rows = found["rows"]
    lines = ["| ranked by | AUC | precision |", "|---|---|---|"]
    for name in rows[0]["found"]:
        each = [row["found"][name] for row in rows]
        auc, precision = ([own[key] for own in each] for key in ("auc", "precision"))
        lines.append(f"| {name} | {_mean(auc, 3)} | {_mean(precision, 2)} |")
    lines += ["", "| weights and graph | test accuracy |", "|---|---|"]
    for name in rows[0]["test accuracy"]:
        lines.append(f"| {name} | {_mean([row['test accuracy'][name] for row in rows], 3)} |")
    return "\n".join(lines)


def _mean(values: list[float], digits: int) -> str:
    """With half of its 95% interval over seeds, by Student's t."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.{digits}f} ± {half:.{digits}f}"


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
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault((row["model"], row["share"], row["what"]), []).append(row)
    for (model, share, what), rows in groups.items():
        numbers = [_mean([row[key] for row in rows], 2) for key in ("recovered", _WITHOUT)]
        cells = [
            _joined([_average(rows, name, place) for place in range(3)], form)
            if name in rows[0]["measures"]
            else ""
            for name, form in (("test accuracy", ".3f"), ("membership of the removed", ".2f"))
        ]
        speedup = _mean([row["speedup"] for row in rows], 2)
        lines.append(
            f"| {model} | {share:.0%} of {what} | {' | '.join([*numbers, *cells, speedup])} |"
        )
    return "\n".join(lines)


def _average(rows: list[dict[str, Any]], name: str, place: int) -> float:
    return mean(row["measures"][name][place] for row in rows)


TABLES = {"sgc": sgc, "unlearning": unlearning, "steps": steps, "attack": attack, "speed": speed}
_WITHOUT = "recovered without the graph's part"

if __name__ == "__main__":
    main()
