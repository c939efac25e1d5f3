"""The tables of ``README.md``, from the results that are kept.

python -m experiments.adapters.table [--write]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from experiments.adapters.results import Results
from experiments.adapters.run import ANEW, RECORDED, ROWS, SUBSETS
from experiments.adapters.setting import KINDS, MODELS, TRAIN
from tda_lightning.evaluation import draw_subsets, linear_datamodeling_score
from tda_lightning.evaluation.additive import additive_ceiling
from tda_lightning.evaluation.ceilings import seed_ceiling

README = Path(__file__).parent / "README.md"
MARKS = ("<!-- table -->", "<!-- end of table -->")
EXACT = "influence, conjugate gradients"


def tables() -> str:
    parts = [_scores(model) for model in MODELS]
    return "\n\n".join([*filter(None, parts), *filter(None, map(_agreement, MODELS))])


def _scores(model: str) -> str:
    """LDS of every row, in the replayed run and in training anew."""
    subsets = draw_subsets(TRAIN, 0.5, SUBSETS)
    columns, seconds = {}, {}
    for kind in KINDS:
        kept = Results.read(model, kind)
        if not all(f"outcomes_{seed}" in kept.arrays for seed in (RECORDED, *ANEW)):
            continue
        seconds[kind] = kept.seconds
        for title, seeds in (("replayed", (RECORDED,)), ("anew", ANEW)):
            outcomes = kept.outcomes(*seeds)
            cells = {
                name: str(linear_datamodeling_score(scores, subsets, outcomes))
                for name, scores in kept.scores.items()
            }
            cells["ceiling, seeds"] = (
                str(seed_ceiling(outcomes).over_queries) if len(seeds) > 1 else ""
            )
            additive = additive_ceiling(subsets, outcomes)
            cells["ceiling, additive"] = "" if additive is None else str(additive.over_queries)
            columns[kind, title] = cells
    if not columns:
        return ""
    heads = [f"{kind}, {title}" for kind, title in columns]
    lines = ["| " + " | ".join([model, *heads, *(f"{kind}, s" for kind in seconds)]) + " |"]
    lines.append("|---" * (1 + len(heads) + len(seconds)) + "|")
    for name in (*ROWS, "ceiling, seeds", "ceiling, additive"):
        cells = [column.get(name, "") for column in columns.values()]
        cells += [f"{kind[name]:.0f}" if name in kind else "" for kind in seconds.values()]
        if any(cells):
            lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def _agreement(model: str) -> str:
    """Correlation of approximate inverses with the solved one, over the adapters."""
    scores = Results.read(model, "lora").scores
    if EXACT not in scores:
        return ""
    rows = [
        f"| {name} | {_correlation(scores[name], scores[EXACT]):.3f} |"
        for name in ROWS
        if name.startswith("influence") and name in scores and name != EXACT
    ]
    head = f"| {model}, lora | correlation with conjugate gradients, mean over queries |"
    return "\n".join([head, "|---|---|", *rows])


def _correlation(left: Tensor, right: Tensor) -> float:
    pairs = zip(left.double(), right.double(), strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the README")
    if not parser.parse_args().write:
        print(tables())
        return
    text = README.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    README.write_text(f"{before}{MARKS[0]}\n{tables()}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
