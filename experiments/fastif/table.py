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
ANCHORS = {"wrong": "wrong pairs", "any": "any pairs"}
METHODS = {
    "helpful": "most helpful, descent",
    "balanced": "most helpful, half of each label, descent",
    "harmful": "most harmful, ascent",
    "nearest": "nearest neighbours, descent",
    "random": "random, descent",
    "anchors": "none: the pairs themselves, descent",
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
    """What each way costs, and how often it goes into the full job."""
    (kept,) = load("times").values()
    k, many, count = kept["k"], kept["many"], kept["num_train"]
    lissa = "LiSSA 1000 x 1"
    ways = [
        (f"{lissa}, {count} gradients one by one, in PyTorch alone (published)", ["published"], 1),
        (f"{lissa}, {count} gradients one by one, ours", ["lissa", "gradients_one_by_one"], 1),
        (f"{lissa}, {count} gradients in batches, ours", ["lissa", "gradients_in_batches"], 1),
        ("InfluenceFunction, EK-FAC, a single query", ["ekfac_one"], 1),
        (f"InfluenceFunction, EK-FAC, of {many} queries together", ["ekfac_many"], many),
        (f"FastInfluence, k = {k}, the first query ever", ["fastif_first"], 1),
        (f"FastInfluence, k = {k}, a single query", ["fastif_one"], 1),
        ("FastInfluence, k = 100, a single query", ["fastif_k100_one"], 1),
        (f"FastInfluence, k = {k}, of {many} queries together", ["fastif_many"], many),
    ]

    def seconds(parts: Sequence[str], clock: str, queries: int) -> float:
        lists = [kept["ways"][part][clock] for part in parts]
        return sum(sum(found) / len(found) for found in lists) / queries

    processor = [seconds(parts, "processor", queries) for _, parts, queries in ways]
    wall = [seconds(parts, "wall", queries) for _, parts, queries in ways]
    lines = [
        [
            ways[n][0],
            f"{processor[n]:.3f}",
            f"{wall[n]:.3f}",
            *(f"{processor[m] / processor[n]:.1f} ({wall[m] / wall[n]:.1f})" for m in range(3)),
        ]
        for n in range(len(ways))
    ]
    heads = ["way", "processor s for a query", "wall s"]
    heads += [f"times below {what}" for what in ("PyTorch alone", "ours one by one", "in batches")]
    same = kept["same"]
    about = (
        f"FastIF at k = {k} against InfluenceFunction, {many} queries: Spearman over the "
        f"candidates {told(same['spearman'], 3)}, recall of the ten most helpful of all {count} "
        f"{told(same['recall_at_10'])}. EK-FAC over all of them takes "
        f"{processor[3] / processor[6]:.1f} times as long as FastIF for a single query, "
        f"{processor[4] / processor[8]:.1f} times for {many} together. "
        "Ratios by processor time (wall time):"
    )
    return f"{about}\n\n{table(heads, lines)}"


def corrections() -> str:
    """Changes of accuracy, seed by seed: at the rate chosen on other pairs, and at all rates."""
    kept = list(load("correct").values())
    before = "; ".join(
        f"{SETS[name]} {by_seed([one['before'][name] for one in kept])}" for name in SETS
    )
    counts = ", ".join(f"{one['wrong']} ({one['groups']} groups)" for one in kept)
    said = ", ".join(f"{one['says_entailment']:.2f}" for one in kept)
    about = (
        f"Accuracy before, by seed: {before}. Wrong among the HANS-like queries: {counts}. The "
        f"model says entailment for a share of {said} of the HANS-like test pairs."
    )
    lines, grid = [], []
    for rows in same_rows("correct"):
        one, chosen = rows[0], [row["chosen"] for row in rows]
        what = [ANCHORS[one["anchors"]], METHODS[one["method"]]]
        shares = [
            ", ".join(f"{row[share]:.2f}" for row in rows) if one["method"] != "anchors" else ""
            for share in ("contradicting", "entailment")
        ]
        gains = [by_seed([pick["gain"][name] for pick in chosen], 3) for name in SETS]
        picked = ", ".join(f"{pick['rate']:g}" for pick in chosen)
        right = ", ".join(f"{anchors_right(row):.2f}" for row in rows)
        lines.append([*what, picked, *gains, right, *shares])
        rates = list(zip(*(row["rates"] for row in rows), strict=True))
        for name in SETS:
            cells = [", ".join(f"{r['gain'][name][0]:.3f}" for r in found) for found in rates]
            grid.append([*what, SETS[name], *cells])
        cells = [", ".join(f"{r['says_entailment']:.2f}" for r in found) for found in rates]
        grid.append([*what, "called entailed", *cells])
    heads = ["for", "chosen", "rate, by seed", *(f"change on {name}" for name in SETS.values())]
    heads += ["anchors right after", "of the contradicting ones", "labelled entailment"]
    grid_heads = [f"{one['rate']:g}" for one in kept[0]["rows"][0]["rates"]]
    return (
        f"{about}\n\nAt the rate chosen on half of the HANS-like test pairs, the change of "
        f"accuracy on the other half of each set:\n\n{table(heads, lines)}\n\nAt every rate, by "
        "seed: the change of accuracy on all test pairs of each set, and the share of HANS-like "
        "test pairs that the model then calls entailed:\n\n"
        f"{table(['for', 'chosen', '', *grid_heads], grid)}"
    )


def anchors_right(row: dict[str, Any]) -> float:
    """At the chosen rate."""
    return next(
        one["anchors_right"] for one in row["rates"] if one["rate"] == row["chosen"]["rate"]
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
