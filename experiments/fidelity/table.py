"""The tables and the figure of the README, from the kept results, within seconds.

python -m experiments.fidelity.table            # print
python -m experiments.fidelity.table --write    # and put them into README.md and figure.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from experiments.fidelity.figure import figure
from experiments.fidelity.kept import PROTOCOLS, RESULTS, Kept, load
from experiments.fidelity.studies import DAMPED, STUDIES, TITLES
from tda_lightning.evaluation import Interval, difference
from tda_lightning.evaluation.linear_datamodeling import bootstrap, rank_correlation

HERE = Path(__file__).parent
BEGIN, END = "<!-- by table.py, from here -->", "<!-- to here -->"
WORDS = {"single_run": "single run", "algorithm": "algorithm"}
COMPARED = [
    ("source", "influence"),
    ("source", "tracin"),
    ("source", "source_blocks"),
    ("source_blocks", "influence"),
    ("source_recorded", "source"),
    ("source_recorded", "influence"),
]


@dataclass(frozen=True)
class Row:
    """One line of a study's table.

    Attributes:
        name: of the estimator.
        damping: chosen on other subsets; None for estimators without one, or as it comes.
        lds: by protocol.
        seconds: to make the scores.
    """

    name: str
    damping: dict[str, str] | None
    lds: dict[str, Interval]
    seconds: float | None


def main() -> None:
    """Print the tables; write them where the README has them."""
    parser = argparse.ArgumentParser(description="The tables, from the kept results.")
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    options = parser.parse_args()
    found = {name: load(name) for name in STUDIES if (RESULTS / f"{name}.npz").exists()}
    text = tables(found)
    print(text)
    if options.write:
        readme = HERE / "README.md"
        before, _, rest = readme.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
        (HERE / "figure.svg").write_text(figure({name: rows(k) for name, k in found.items()}))


def tables(found: Mapping[str, Kept]) -> str:
    """Sizes, one table for each study, and the differences: markdown."""
    parts = [sizes(found)]
    parts += [f"### {STUDIES[name].title}\n\n{markdown(rows(k))}" for name, k in found.items()]
    parts.append(f"### Differences\n\n{differences(found)}")
    parts.append(f"### Single run, 5% left out\n\n{few_left_out(found)}")
    return "\n\n".join(parts)


def lds(kept: Kept, name: str) -> dict[str, Interval]:
    """By protocol, with intervals over queries."""
    return {p: bootstrap(_correlations(kept, name, p)) for p in kept.truth}


def best(kept: Kept, family: str, protocol: str) -> str | None:
    """The scores of a grid of dampings that do best on the subsets for choosing."""
    grid = [name for name in kept.predicted if name == family or name.startswith(f"{family}-")]
    if not grid:
        return None
    by = protocol if protocol in kept.validation else next(iter(kept.validation))
    truth = kept.validation[by].T

    def value(name: str) -> float:
        return float(rank_correlation(kept.predicted_validation[name], -truth).nanmean())

    return max(grid, key=value)


def rows(kept: Kept) -> list[Row]:
    """Every estimator, grids of dampings as two: the default and the best."""
    found = []
    for name in TITLES:
        if name in DAMPED:
            default = DAMPED[name]
            if default not in kept.predicted:
                continue
            chosen = {p: best(kept, name, p) or default for p in kept.truth}
            told = {p: one.partition("-")[2] or "default" for p, one in chosen.items()}
            tuned = {p: lds(kept, one)[p] for p, one in chosen.items()}
            found.append(Row(name, None, lds(kept, default), kept.about["seconds"][default]))
            found.append(Row(name, told, tuned, None))
        elif name in kept.predicted:
            found.append(Row(name, None, lds(kept, name), kept.about["seconds"][name]))
    return found


def markdown(table: list[Row]) -> str:
    """One study's table."""
    protocols = [p for p in PROTOCOLS if p in table[0].lds]
    heads = [f"LDS, {WORDS[p]}" for p in protocols]
    lines = [
        f"| estimator | {' | '.join(heads)} | processor time |",
        "|---" * (len(heads) + 2) + "|",
    ]
    top = {p: max(row.lds[p].value for row in table) for p in protocols}
    for row in table:
        cells = []
        for p in protocols:
            text = str(row.lds[p])
            if row.lds[p].value == top[p]:
                text = f"**{text}**"
            cells.append(text if row.damping is None else f"{text}, at {row.damping[p]}")
        title = TITLES[row.name]
        if row.name in DAMPED:
            title += ", default damping" if row.damping is None else ", best damping"
        seconds = "" if row.seconds is None else f"{row.seconds:.1f} s"
        lines.append(f"| {title} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def sizes(found: Mapping[str, Kept]) -> str:
    """What was trained, and how often."""
    lines = [
        "| study | examples | weights | steps | queries | subsets | retraining: single run, "
        "algorithm |",
        "|---" * 7 + "|",
    ]
    for name, kept in found.items():
        about = kept.about
        subsets, queries = next(iter(kept.truth.values())).shape
        minutes = [f"{about['retraining_seconds'].get(p, 0) / 60:.0f} min" for p in PROTOCOLS]
        lines.append(
            f"| {STUDIES[name].title} | {about['num_train']} | {about['num_parameters']} | "
            f"{about['steps']} | {queries} | {subsets} | {', '.join(minutes)} |"
        )
    return "\n".join(lines)


def differences(found: Mapping[str, Kept]) -> str:
    """Pairs of estimators, query by query, with both intervals."""
    lines = ["| study | protocol | less | over queries | over subsets |", "|---" * 5 + "|"]
    for study, kept in found.items():
        for protocol in kept.truth:
            named = {one for pair in COMPARED for one in pair}
            chosen = {one: best(kept, one, protocol) if one in DAMPED else one for one in named}
            chosen = {one: name for one, name in chosen.items() if name in kept.predicted}
            drawn = over_subsets(kept, protocol, {str(name) for name in chosen.values()})
            for first, second in COMPARED:
                if {first, second} - chosen.keys():
                    continue
                a, b = str(chosen[first]), str(chosen[second])
                scores = lds(kept, a)[protocol], lds(kept, b)[protocol]
                gaps = np.nanmean(drawn[a] - drawn[b], axis=1)
                low, high = np.quantile(gaps, [0.025, 0.975])
                titles = [
                    TITLES[one] + (", best damping" if one in DAMPED else "")
                    for one in (first, second)
                ]
                lines.append(
                    f"| {STUDIES[study].title} | {WORDS[protocol]} | {' - '.join(titles)} | "
                    f"{difference(*scores)} | [{low:.3f}, {high:.3f}] |"
                )
    return "\n".join(lines)


def few_left_out(found: Mapping[str, Kept]) -> str:
    """The studies that were also judged by removals of 5%, with slopes."""
    lines = ["| study | scores | LDS | slope |", "|---" * 4 + "|"]
    for study, kept in found.items():
        for row in kept.about["few_left_out"]:
            low, high = row["over_queries"]
            lines.append(
                f"| {STUDIES[study].title} | {row['name']} | {row['lds']:.3f} "
                f"[{low:.3f}, {high:.3f}] | {row['slope']:.3g} |"
            )
    return "\n".join(lines)


def over_subsets(kept: Kept, protocol: str, names: Iterable[str]) -> dict[str, NDArray[np.float64]]:
    """LDS of each query after subsets were drawn again, the same for all: [draw, query]."""
    truth = -kept.truth[protocol].T.numpy()
    count = truth.shape[1]
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=200)
    return {name: redrawn(kept.predicted[name].numpy(), truth, draws) for name in names}


def redrawn(
    predicted: NDArray[np.float64], truth: NDArray[np.float64], draws: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Spearman's correlation of each row after subsets were drawn again, [draw, row].

    A subset drawn c times counts as c level ones, so nothing is sorted again: the middle of level
    copies lies after all copies of lower ones.

    Args:
        predicted: [row, subset].
        truth: the same.
        draws: how often each subset was drawn, [draw, subset].
    """
    found = np.empty((len(draws), len(truth)))
    for row, pair in enumerate(zip(predicted, truth, strict=True)):
        a, b = (_middles(values, draws) for values in pair)
        products = [(draws * x * y).sum(1) for x, y in ((a, b), (a, a), (b, b))]
        with np.errstate(invalid="ignore"):  # all that was drawn may be level
            found[:, row] = products[0] / np.sqrt(products[1] * products[2])
    return found


def _middles(values: NDArray[np.float64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Centred ranks of the copies, level ones at their middle, [draw, subset]."""
    _, level, sizes = np.unique(values, return_inverse=True, return_counts=True)
    starts = sizes.cumsum() - sizes
    counts = np.add.reduceat(draws[:, level.argsort(kind="stable")], starts, axis=1)
    middles = counts.cumsum(1) - (counts - 1) / 2
    return middles[:, level] - (draws.sum(1, keepdims=True) + 1) / 2


def _correlations(kept: Kept, name: str, protocol: str) -> Tensor:
    return rank_correlation(kept.predicted[name], -kept.truth[protocol].T)


if __name__ == "__main__":
    main()
