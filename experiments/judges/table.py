"""The tables of the README, from the kept results.

python -m experiments.judges.table            # print
python -m experiments.judges.table --write    # and put them into README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.judges.names import BASELINE, BRITTLE_QUERIES, OURS, THEIRS
from experiments.judges.setting import FLIPPED, NUM_TRAIN
from experiments.marked import with_block
from experiments.shares import area_interval, share_interval
from tda_lightning.report import Interactions

HERE = Path(__file__).parent
LABELS = {
    **{name: name for name in OURS},
    **{f"{name} x similarity": f"{name}, times similarity" for name in OURS},
    **{name: f"quanda's {name}" for name in (*THEIRS, BASELINE)},
}
# The problem that a column is about, and its key in the results.
COLUMNS = {
    "LDS, replayed": ("clean", "LDS replayed"),
    "LDS, fresh": ("clean", "LDS fresh"),
    "wrong labels": ("mislabelled", "mislabelled"),
    "class": ("clean", "class"),
    "subclass": ("subclass", "subclass"),
    "shortcut": ("shortcut", "shortcut"),
    "mixed data": ("mixed", "mixed"),
    "top-5 cardinality": ("clean", "cardinality"),
    "random model": ("clean", "randomisation"),
}
WRONG = round(FLIPPED * NUM_TRAIN), round((1 - FLIPPED) * NUM_TRAIN)  # labels, and right ones
TEXT = ("filtering", "recall@50", "MRR", "quanda MRR", "quanda recall", "class", "cardinality")


def main() -> None:
    """Print the tables; write them where the README has them."""
    parser = argparse.ArgumentParser(description="The tables, from the kept results.")
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    options = parser.parse_args()
    groups = by_group()
    blocks = {"digits": digits(), "seconds": seconds(), "text": text(), "dattri": dattri()}
    blocks["tail-patch"] = tail_patch()
    blocks["brittleness"] = brittleness()
    blocks["groups"] = "" if groups is None else groups.table()
    for block in blocks.values():
        print(block, end="\n\n")
    if options.write:
        readme = HERE / "README.md"
        written = readme.read_text()
        for name, block in blocks.items():
            written = with_block(written, name, block)
        readme.write_text(written)
        if groups is not None:
            (HERE / "interactions.svg").write_text(groups.picture())


def load(name: str) -> dict[str, Any]:
    """What has been found of one problem."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def told(value: Sequence[float] | None) -> str:
    """A score, with its interval where there is one; a dash where there is none."""
    if not value:
        return "\N{EN DASH}"
    if len(value) == 1:
        return f"{value[0]:.2f}"
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def with_ends(area: float) -> list[float]:
    """quanda's area of finding wrong labels, with the interval that the counts give it.

    Its curve is over all examples, so its area is a line in the area under the ROC curve.
    """
    ends = area_interval((area - FLIPPED / 2) / (1 - FLIPPED), *WRONG)
    return [area, *((1 - FLIPPED) * end + FLIPPED / 2 for end in ends)]


def digits() -> str:
    """quanda's metrics on MNIST."""
    found = {problem: load(problem) for problem, _ in COLUMNS.values()}

    def cell(name: str, problem: str, key: str) -> str:
        kept = found[problem]
        own = kept.get(f"{name}: {key}", kept.get(name, {}).get(key))
        return told(with_ends(own[0]) if own and key == "mislabelled" else own)

    lines = [
        [label, *(cell(name, problem, key) for problem, key in COLUMNS.values())]
        for name, label in LABELS.items()
        if any(name in kept for kept in found.values())
    ]
    right = ", ".join(
        f"{problem} {kept['accuracy']['query']:.2f}"
        for problem, kept in found.items()
        if "accuracy" in kept
    )
    return (
        f"{table(['', *COLUMNS], lines)}\n\nShare of the 64 queries answered as labelled: {right}."
    )


def seconds() -> str:
    """Processor time of a first ``explain``, of a second one of other queries, of the first ones
    again, and of self-influence."""
    kept = load("clean")
    lines = []
    for name, label in LABELS.items():
        if (took := kept.get(f"{name}: seconds")) is not None:
            first, second = took["first"], took["second"]
            share = f"{second / first:.2f}" if first else "\N{EN DASH}"
            times = [f"{took[part]:.2f}" for part in ("first", "second", "again", "self")]
            lines.append([label, *times[:2], share, *times[2:]])
    heads = ["first, s", "other queries, s", "share of the first", "the same again, s"]
    return table(["", *heads, "self-influence, s"], lines)


def text() -> str:
    """DATE-LM's measures, and quanda's, on sentence pairs."""
    kept = load("text")
    lines = []
    for name, found in kept.items():
        if name in ("accuracy", "interactions"):
            continue
        *area, chance = found["filtering"]
        cells = [told(area), *(told(found[key]) for key in TEXT[1:])]
        lines.append([LABELS.get(name, name), *cells])
    if not lines:
        return ""
    right = ", ".join(f"{name} {share:.2f}" for name, share in kept["accuracy"].items())
    return (
        f"{table(['', 'filtering, AUPRC', *TEXT[1:]], lines)}\n\nBy chance the area is "
        f"{chance:.3f}. Right answers: {right}."
    )


def tail_patch() -> str:
    """Change of the target's probability by a step on a proponent, in percentage points."""
    kept = load("tail_patch")
    if not kept:
        return ""
    before = kept.pop("target")
    lines = []
    for name, found in kept.items():
        value, low, high = (100 * part for part in found)
        lines.append([name, f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"])
    heads = ["scores", "change of the target's probability, percentage points"]
    return f"{table(heads, lines)}\n\nBefore the step the mean is {100 * before:.2f}%."


def brittleness() -> str:
    """Shares of the predictions that flip without a query's first proponents."""
    kept = load("brittleness")
    if not kept:
        return ""
    first = next(iter(kept.values()))
    heads = ["left out: the first by", *(f"{k} examples" for k in first["removed"])]
    lines = [
        [name, *(told([own, *share_interval(own, BRITTLE_QUERIES)]) for own, _ in row["flipped"])]
        for name, row in kept.items()
    ]
    # Of several draws for each query, which are not independent: their interval is of the queries.
    chance = [told([own, *share_interval(own, BRITTLE_QUERIES)]) for _, own in first["flipped"]]
    return table(heads, [*lines, ["random", *chance]])


def by_group() -> Interactions | None:
    """Scores of sentence pairs by group of queries and of training pairs."""
    kept = load("text").get("interactions")
    if kept is None:
        return None
    numbers = {
        name: value if name in ("train", "query") else torch.tensor(value)
        for name, value in kept.items()
    }
    return Interactions(**numbers)


def dattri() -> str:
    """Its metrics' values beside ours, and how far they are apart."""
    lines = []
    for protocol in ("replayed", "fresh"):
        for name, (theirs, ours, _, _, apart) in (
            load("clean").get(f"dattri: LDS {protocol}", {}).items()
        ):
            row = [f"LDS, {protocol}", LABELS[name], f"{theirs:.4f}", f"{ours:.4f}", f"{apart:.0e}"]
            lines.append(row)
    for name, (theirs, ours) in load("mislabelled").get("dattri: wrong labels", {}).items():
        row = ["AUC of wrong labels", LABELS[name], f"{theirs:.4f}", f"{ours:.4f}"]
        lines.append([*row, f"{abs(theirs - ours):.0e}"])
    return table(["metric", "scores", "dattri", "ours", "largest difference"], lines)


if __name__ == "__main__":
    main()
