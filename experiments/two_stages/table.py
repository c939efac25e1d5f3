"""README's table and figure, from the stored outcomes and ranks.

python -m experiments.two_stages.table

Nothing is retrained or scored: a few seconds, from a clean checkout.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.marked import with_block
from experiments.shares import share_interval
from experiments.two_stages.figure import dots
from experiments.two_stages.results import Results, read
from tda_lightning.evaluation import Interval, difference, linear_datamodeling_score
from tda_lightning.store.atomic_write import write_text

HERE = Path(__file__).parent
TESTS = 10_000  # pictures, of either test set
PROTOCOLS = {"single_run": "single run", "algorithm": "algorithm"}
TITLES = {
    "unrolled": "exact unrolling",
    "unrolled at half": "exact unrolling, keep=0.5",
    "exact": "exact derivative of both stages, forwards",
    "exact at half of stage 1": "the same where stage 1 has weights of 1/2",
    "exact at half": "the same where both stages have weights of 1/2",
    "recorded": "SOURCE, recorded order",
    "recorded at half": "SOURCE, recorded order, keep=0.5",
    "source": "SOURCE",
    "source at half": "SOURCE, keep=0.5",
    "recorded_blocks": "SOURCE, recorded order, blocks",
    "source_blocks": "SOURCE, blocks",
    "source_blocks at half": "SOURCE, blocks, keep=0.5",
    "multi_stage": "multi-stage influence function",
    "influence": "influence function",
    "influence_both": "influence function, both sets",
    "tracin": "TracIn, stage 1",
    "tracin_both": "TracIn, both stages",
    "gradient_dot": "gradient dot product",
    "last_layer": "last-layer cosine",
    "random": "random",
}
DAMPED = ("multi_stage", "influence", "influence_both")


@dataclass(frozen=True)
class Row:
    """One line of the table: LDS by protocol, and the seconds that the scores took."""

    title: str
    lds: dict[str, Interval]
    seconds: float


def main() -> None:
    """:func:`publish`, as a command."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    publish()


def publish() -> None:
    """Write the tables into README.md and the figure beside the results, and print the tables."""
    results = read(HERE / "results")
    rows = judged(results)
    text = (HERE / "README.md").read_text()
    for name, block in (
        ("run", recorded(results)),
        ("table", table(rows)),
        ("hindsight", hindsight(results)),
        ("seeds", agreement(results)),
    ):
        print(f"{block}\n")
        text = with_block(text, name, block)
    write_text(HERE / "README.md", text)
    write_text(HERE / "results" / "lds.svg", figure(rows))


def judged(results: Results) -> dict[str, Row]:
    """Every estimator's LDS; the damped ones by default, and at the best of their dampings."""
    rows: dict[str, Row] = {}
    for name, title in TITLES.items():
        if name in DAMPED:
            rows[name] = row(results, f"{name} {results.default_damping:g}", f"{title}, default")
            best = {protocol: best_damping(results, name, protocol) for protocol in PROTOCOLS}
            chosen = ", ".join(dict.fromkeys(f"{value:g}" for value in best.values()))
            rows[f"{name}_best"] = Row(
                f"{title}, best damping ({chosen})",
                {p: lds(results, f"{name} {best[p]:g}", p) for p in PROTOCOLS},
                rows[name].seconds,
            )
        elif name in results.ranks:
            rows[name] = row(results, name, title)
    return rows


def row(results: Results, name: str, title: str) -> Row:
    found = {protocol: lds(results, name, protocol) for protocol in PROTOCOLS}
    return Row(title, found, results.seconds[name])


def best_damping(results: Results, kind: str, protocol: str) -> float:
    """By the LDS on the validation subsets, which no table is about."""
    return max(
        results.dampings,
        key=lambda damping: lds(results, f"{kind} {damping:g}", protocol, validation=True).value,
    )


def lds(results: Results, name: str, protocol: str, validation: bool = False) -> Interval:
    """From ranks: those of the sums of scores serve as the sums, subset by subset."""
    judging = results.judging
    part = slice(judging, None) if validation else slice(judging)
    ranks: Tensor = results.ranks[name][:, part]
    alone = torch.eye(ranks.shape[1], dtype=torch.bool)
    return linear_datamodeling_score(ranks, alone, results.outcomes[protocol][part])


def table(rows: dict[str, Row]) -> str:
    """As markdown, and under it what SOURCE is above."""
    lines = [
        f"| LDS | {' | '.join(PROTOCOLS.values())} | seconds |",
        "|---" * (len(PROTOCOLS) + 2) + "|",
    ]
    for item in rows.values():
        cells = [str(item.lds[protocol]) for protocol in PROTOCOLS]
        lines.append(f"| {item.title} | {' | '.join(cells)} | {item.seconds:.1f} |")
    lines.append(f"| *SOURCE less:* |{' |' * (len(PROTOCOLS) + 1)}")
    for name, item in rows.items():
        if name != "source":
            gaps = [str(difference(rows["source"].lds[p], item.lds[p])) for p in PROTOCOLS]
            lines.append(f"| {item.title} | {' | '.join(gaps)} | |")
    return "\n".join(lines)


def agreement(results: Results) -> str:
    """How far the truth agrees with itself: what one fresh seed says of another."""
    first, second = results.outcomes["algorithm"][: results.judging, :2].unbind(1)
    found = linear_datamodeling_score(-first.T, torch.eye(len(first), dtype=torch.bool), second)
    reliable = 2 * found.value / (1 + found.value)
    return (
        f"After training anew, the losses of one seed rank those of the other with {found}: a mean "
        f"over two seeds ranks its own expectation with about {reliable**0.5:.2f} "
        "(Spearman-Brown), and a prediction can hardly do better than that."
    )


def hindsight(results: Results) -> str:
    """The most that a choice of damping could have given."""
    most = {
        protocol: max(
            lds(results, f"{kind} {damping:g}", protocol).value
            for kind in DAMPED
            for damping in results.dampings
        )
        for protocol in PROTOCOLS
    }
    found = ", ".join(f"{most[protocol]:.3f} ({words})" for protocol, words in PROTOCOLS.items())
    return (
        "The highest LDS of an influence function at any of the dampings, chosen with hindsight on "
        f"the very subsets that judge: {found}."
    )


def recorded(results: Results) -> str:
    """What the two stages taught the model."""
    found = results.facts["accuracy"]
    columns = list(next(iter(found.values())))

    def told(name: str, share: float) -> str:
        if not name.startswith("test"):  # all there is of it, no sample
            return f"{share:.3f}"
        low, high = share_interval(share, TESTS)
        return f"{share:.3f} [{low:.3f}, {high:.3f}]"

    lines = [f"| accuracy | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {when} | {' | '.join(told(*item) for item in one.items())} |"
        for when, one in found.items()
    ]
    landing = results.facts["landing error of a replay"]
    lines += [
        "",
        "Replayed with nothing left out, both stages miss the recorded end by "
        f"{landing['one by one']:.2g} of the way that stage 2 went; by {landing['stacked']:.2g} "
        "where replays of stage 1 are stacked, as in this study, for rounding alone.",
        "",
        "What exact unrolling, backwards, predicts for the subsets is what the derivative forwards "
        "predicts: in float32 the two differ by "
        + " and by ".join(
            f"{error:.1g} of their length {words}"
            for words, error in results.facts["unrolling and the forward derivative"].items()
        )
        + ", at most over the queries.",
    ]
    return "\n".join(lines)


def figure(rows: dict[str, Row]) -> str:
    """The table's upper half."""
    return dots(
        [(item.title, [item.lds[protocol] for protocol in PROTOCOLS]) for item in rows.values()],
        list(PROTOCOLS.values()),
        "linear datamodeling score, 95% intervals over queries",
    )


if __name__ == "__main__":
    main()
