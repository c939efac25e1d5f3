"""The tables and the figure of the README, from the kept results.

python -m experiments.fastif.table            # print
python -m experiments.fastif.table --write    # and put them into README.md and figure.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.fastif.figure import figure
from experiments.fastif.kept import load

HERE = Path(__file__).parent
BEGIN, END = "<!-- by table.py, from here -->", "<!-- to here -->"
SETS = {"mnli": "MNLI", "hans": "HANS-like"}
TRUTHS = {"ekfac": "EK-FAC, default damping", "exact": "exact Gauss-Newton"}
METHODS = {
    "helpful": "most helpful, descent",
    "harmful": "most harmful, ascent",
    "nearest": "nearest neighbours, descent",
    "random": "random, descent",
    "anchors": "the wrong pairs themselves, descent",
}


def main() -> None:
    """Print the tables; write them where the README has them."""
    parser = argparse.ArgumentParser(description="The tables, from the kept results.")
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    options = parser.parse_args()
    parts = {
        "Fast against full": ("times", speed),
        "(a) Recall": ("recall_ekfac", recalls),
        "(b) Depth and batch of the solver": ("quality", qualities),
        "(c) Correcting errors": ("correct", corrections),
        "(d) Simulatability": ("simulate", simulations),
    }
    made = {title: make() for title, (part, make) in parts.items() if load(part)}
    text = "\n\n".join(f"### {title}\n\n{part}" for title, part in made.items())
    print(text)
    if options.write:
        readme = HERE / "README.md"
        before, _, rest = readme.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
        if load("quality") and load("recall_exact"):
            (HERE / "figure.svg").write_text(figure())


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def told(interval: Sequence[float], digits: int = 2) -> str:
    """A mean with its interval."""
    value, low, high = (f"{number:.{digits}f}" for number in interval)
    return f"{value} [{low}, {high}]"


def by_seed(found: Sequence[Sequence[float]], digits: int = 2) -> str:
    return ", ".join(told(interval, digits) for interval in found)


def same_rows(part: str, *path: str) -> list[list[dict[str, Any]]]:
    """The rows of all seeds that say the same, together."""
    listed = []
    for kept in load(part).values():
        for key in path:
            kept = kept[key]
        listed.append(kept["rows"])
    return [list(rows) for rows in zip(*listed, strict=True)]


def recalls() -> str:
    """Means over the seeds; at the default k also each seed's interval."""
    first = next(iter(load("recall_ekfac").values()))
    ks, count = first["ks"], first["num_train"]
    default = ks.index(1000)
    lines = []
    listed = [(truth, rows) for truth in TRUTHS for rows in same_rows(f"recall_{truth}")]
    for truth, rows in listed:
        one = rows[0]
        means = [sum(row["recall"][n][0] for row in rows) / len(rows) for n in range(len(ks))]
        what = [SETS[one["queries"]], TRUTHS[truth], f"{one['top']} most {one['sign']}"]
        each = by_seed([row["recall"][default] for row in rows])
        lines.append([*what, *(f"{mean:.2f}" for mean in means), each])
    chance = [f"{k / count:.2f}" for k in ks]
    lines.append(["", "", "by chance", *chance, ""])
    return table(
        ["queries", "truth", "sought", *(f"k = {k}" for k in ks), "k = 1000, by seed"], lines
    )


def qualities() -> str:
    """One line for each damping and setting."""
    (kept,) = load("quality").values()
    lines = [
        [
            f"{row['added']:.2g}",
            str(row["depth"]),
            str(row["batch"]),
            told(row["spearman"], 3),
            told(row["pearson"], 3),
            told(row["recall_at_10"]),
            f"{row['residual']:.2g}",
            f"{row['seconds']:.2f}",
        ]
        for row in kept["rows"]
    ]
    ekfac = kept["ekfac"]
    lines.append(
        [
            "relative, 0.1",
            "EK-FAC",
            "",
            told(ekfac["spearman"], 3),
            told(ekfac["pearson"], 3),
            told(ekfac["recall_at_10"]),
            "",
            "",
        ]
    )
    heads = ["damping", "depth", "batch", "Spearman", "Pearson", "recall@10", "residual", "s"]
    about = (
        f"{kept['num_queries']} queries, their {kept['k']} candidates, scale "
        f"{kept['scale']:.3g}, weight decay {kept['decay']:g} beside the damping. The library's "
        f"product differs from that of the gradients by {kept['product_error']:.1e}, relatively."
    )
    return f"{about}\n\n{table(heads, lines)}"


def speed() -> str:
    """What each thing costs, and how often it goes into the full job."""
    (kept,) = load("times").values()
    k, many, count = kept["k"], kept["many"], kept["num_train"]
    full = kept["query_gradient"] + kept["lissa_1000_1"] + kept["all_gradients"]
    single = kept["100_gradients_one_by_one"] / 100 * count
    literal = kept["query_gradient"] + kept["lissa_1000_1"] + single
    ways = [
        (f"LiSSA 1000 x 1, {count} gradients one by one (as published)", literal),
        (f"LiSSA 1000 x 1, {count} gradients in batches", full),
        (f"InfluenceFunction, EK-FAC, of {many} queries together", kept["ekfac_many"] / many),
        (f"FastInfluence, k = {k}, the first query ever", kept["fastif_first"]),
        (f"FastInfluence, k = {k}, a single query", kept["fastif_one"]),
        ("FastInfluence, k = 100, a single query", kept["fastif_k100_one"]),
        (f"FastInfluence, k = {k}, of {many} queries together", kept["fastif_many"] / many),
    ]
    last = ways[-1][1]
    lines = [
        [name, f"{seconds:.3f}", f"{literal / seconds:.1f}", f"{full / seconds:.1f}"]
        for name, seconds in ways
    ]
    heads = ["way", "s for a query", "times below the published", "times below LiSSA in batches"]
    same = kept["same"]
    about = (
        f"FastIF at k = {k} against InfluenceFunction, {many} queries: Spearman over the "
        f"candidates {told(same['spearman'], 3)}, recall of the ten most helpful of all {count} "
        f"{told(same['recall_at_10'])}. EK-FAC over all of them takes "
        f"{kept['ekfac_many'] / many / last:.1f} times as long as FastIF."
    )
    return f"{about}\n\n{table(heads, lines)}"


def corrections() -> str:
    """Changes of accuracy, seed by seed."""
    kept = load("correct")
    before = "; ".join(
        f"{SETS[name]} {by_seed([one['before'][name] for one in kept.values()])}" for name in SETS
    )
    lines = []
    for rows in same_rows("correct"):
        one = rows[0]
        method = one["method"]
        shares, labels = (
            ", ".join(
                f"{one[what][method]:.2f}" if method in one[what] else "" for one in kept.values()
            )
            for what in ("contradicting", "entailment")
        )
        lines.append(
            [
                METHODS[method],
                f"{one['rate']:g}",
                SETS[one["test"]],
                by_seed([row["gain"] for row in rows], 3),
                ", ".join(f"{row['anchors_right']:.2f}" for row in rows),
                shares,
                labels,
            ]
        )
    heads = ["chosen", "rate", "tested on", "change of accuracy, by seed", "anchors right after"]
    heads += ["of the contradicting ones", "labelled entailment"]
    counts = ", ".join(f"{one['wrong']} ({one['groups']} groups)" for one in kept.values())
    said = ", ".join(f"{one['said_entailment']['hans']:.2f}" for one in kept.values())
    return (
        f"Accuracy before, by seed: {before}. Wrong among the HANS-like queries: {counts}. The "
        f"model says entailment for a share of {said} of the HANS-like test pairs.\n\n"
        f"{table(heads, lines)}"
    )


def simulations() -> str:
    """What steps on a single pair do, seed by seed."""
    lines = []
    for rows in same_rows("simulate"):
        for kind in rows[0]["change"]:
            lines.append(
                [
                    str(rows[0]["steps"]),
                    kind,
                    by_seed([row["change"][kind] for row in rows], 4),
                    by_seed([row["agrees"][kind] for row in rows]),
                ]
            )
        lines.append(
            [
                str(rows[0]["steps"]),
                "all: Spearman of score and fall",
                "",
                by_seed([row["spearman"] for row in rows]),
            ]
        )
    heads = ["steps", "pair", "change of the query's loss, by seed", "sign as the score says"]
    return table(heads, lines)


if __name__ == "__main__":
    main()
