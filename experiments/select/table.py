"""The table of the README, from the kept results.

python -m experiments.select.table            # print
python -m experiments.select.table --write    # and put it into README.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.fastif.kept import crossed
from experiments.marked import with_block
from experiments.select.kept import all_results, digits

README = Path(__file__).parent / "README.md"
METHODS = {
    "helpful": "most helpful (`tda select`)",
    "balanced": "most helpful, half of each label",
    "harmful": "most harmful",
    "nearest": "nearest to the anchors",
    "random": "random",
    "less": "gradient matching (LESS)",
    "anchors": "the anchors themselves",
}
HEADS = (
    *("rate", "trained on", "runs", "HANS-like: change of accuracy", "MNLI: change of accuracy"),
    *("said not entailed, HANS-like", "of the chosen: not entailed", "contradicting", "distinct"),
    "seconds",
)


def main() -> None:
    """Print the table; write it where the README has it."""
    parser = argparse.ArgumentParser(description="The table, from the kept results.")
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    text = block(all_results())
    print(text)
    if parser.parse_args().write:
        README.write_text(with_block(README.read_text(), "table", text))


def block(results: Sequence[dict[str, Any]]) -> str:
    """What was measured, in Markdown."""
    sizes = results[0]["sizes"]
    before = {name: _before(results, name) for name in ("hans", "mnli")}
    said = _mean(results, lambda one: digits(one["before"]["said_not_hans"]).mean())
    lines = [
        f"{len(results)} recorded runs (seeds), with {_replicas(results)} replicas. Trained on "
        f"{sizes['train']} pairs; pool of "
        f"{sizes['pool']}, {sizes['contradicting']} of them contradict the heuristics of HANS, "
        f"{sizes['pool_not_entailed']:.0%} are not entailed; target of {sizes['target']} HANS-like "
        f"pairs; tests on {sizes['test']['hans']} other HANS-like pairs and "
        f"{sizes['test']['mnli']} other pairs of MNLI. Before: accuracy {before['hans']:.3f} on "
        f"HANS-like pairs, of which {said:.2f} are said to be not entailed, and "
        f"{before['mnli']:.3f} on MNLI. Gradient matching took "
        f"{_mean(results, lambda one: one['less_seconds']):.0f} processor seconds per run besides.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{'---|' * len(HEADS)}",
    ]
    every = [(one, row) for one in results for row in one["rows"]]
    for rate in sorted({row["rate"] for _, row in every}):
        for method, name in METHODS.items():
            rows = [
                (one, row) for one, row in every if (row["method"], row["rate"]) == (method, rate)
            ]
            if rows:
                lines.append(f"| {' | '.join([f'{rate:g}', name, *_cells(rows)])} |")
    for rate in sorted({row["rate"] for _, row in every}):
        lines += [
            "",
            f"Paired by seed and test pair, at a rate of {rate:g}: {_differences(every, rate)}.",
        ]
    return "\n".join(lines)


def _replicas(results: Sequence[dict[str, Any]]) -> str:
    counts = [str(len({row["replica"] for row in one["rows"]})) for one in results]
    return f"{', '.join(counts[:-1])} and {counts[-1]}" if len(counts) > 1 else counts[0]


def _differences(every: Sequence[tuple[dict[str, Any], dict[str, Any]]], rate: float) -> str:
    """What the most helpful pairs gain beyond other ways of choosing, HANS-like."""

    def of(method: str) -> Tensor:
        asked = (method, rate)
        return gains([(o, r) for o, r in every if (r["method"], r["rate"]) == asked], "hans")

    return "; ".join(
        f"most helpful less {METHODS[other].partition(' (')[0]} {told(of('helpful') - of(other))}"
        for other in ("random", "nearest", "less", "anchors")
    )


def _cells(rows: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    chosen = [row for _, row in rows if row["not_entailed"] is not None]

    def mean(name: str, listed: Sequence[dict[str, Any]]) -> str:
        return f"{sum(row[name] for row in listed) / len(listed):.2f}" if listed else "-"

    said = torch.cat([digits(row["said_not_hans"]) for _, row in rows]).mean()
    distinct = sum(row["distinct"] for row in chosen) / max(1, len(chosen))
    seconds = sorted(row["seconds"] for _, row in rows)[len(rows) // 2]
    return [
        str(len(rows)),
        *(told(gains(rows, name)) for name in ("hans", "mnli")),
        f"{float(said):.2f}",
        mean("not_entailed", chosen),
        mean("contradicting", chosen),
        f"{distinct:.0f}" if chosen else "-",
        f"{seconds:.1f}",
    ]


def gains(rows: Sequence[tuple[dict[str, Any], dict[str, Any]]], name: str) -> Tensor:
    """Change of every test pair's rightness, [seed, pair]: the mean over a seed's replicas, which
    begin at the same recorded weights and so are not independent."""
    of_seeds: dict[int, list[Tensor]] = {}
    for one, row in rows:
        change = digits(row[f"right_{name}"]) - digits(one["before"][f"right_{name}"])
        of_seeds.setdefault(id(one), []).append(change)
    return torch.stack([torch.stack(changes).mean(0) for changes in of_seeds.values()])


def told(values: Tensor) -> str:
    """A mean with its interval over seeds and pairs."""
    mean, low, high = crossed(values)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _before(results: Sequence[dict[str, Any]], name: str) -> float:
    return _mean(results, lambda one: digits(one["before"][f"right_{name}"]).mean())


def _mean(results: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], Any]) -> float:
    return float(sum(float(of(one)) for one in results) / len(results))


if __name__ == "__main__":
    main()
