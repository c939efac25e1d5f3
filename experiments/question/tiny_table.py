"""What adamw.py found, as tables: which point serves which question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tda_lightning.evaluation import Interval
from tda_lightning.evaluation.linear_datamodeling import bootstrap, rank_correlation

TITLES = {
    "concrete": "Concrete, tanh MLP",
    "mnist": "MNIST, ReLU MLP",
    "transformer": "WikiText-2, transformer",
}
ASKED = ("0.95", "0.5")  # shares kept in the tables
PROTOCOLS = {"single_run": "single run", "fresh": "fresh seeds"}


@dataclass(frozen=True)
class Tiny:
    """The results of one problem.

    Attributes:
        removed: by share kept and point: sums of scores over what is left out, float64 [query,
            subset].
        truth: by protocol and share kept: measurements [query, subset], the mean over seeds.
        seeds: those of fresh seeds one by one, [seed, query, subset].
        recorded: measurements of the recorded run, [query].
        points: names.
    """

    removed: dict[str, dict[str, Tensor]]
    truth: dict[tuple[str, str], Tensor]
    seeds: dict[str, Tensor]
    recorded: Tensor
    points: list[str]


def load(file: Path) -> Tiny:
    """What ``adamw.keep`` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        points = json.loads(str(arrays["points"]))
        unit = dict(zip(points, torch.from_numpy(arrays["unit"])[..., None], strict=True))
        removed, truth, seeds = {}, {}, {}
        for key in arrays.files:
            kind, _, share = key.partition("-")
            found = torch.from_numpy(arrays[key]).double() if share else None
            if kind == "removed":
                names = points if share in ASKED else few(points)
                rows = zip(names, found, strict=True)
                removed[share] = {name: row * unit[name] for name, row in rows}
            elif kind == "single_run":
                truth[kind, share] = found.T
            elif kind == "fresh":
                seeds[share] = found.transpose(1, 2)
                truth[kind, share] = seeds[share].mean(0)
        recorded = torch.from_numpy(arrays["recorded"]).double()[0]
        return Tiny(removed, truth, seeds, recorded, points)


def few(points: Sequence[str]) -> list[str]:
    """Those that are also compared at other shares than are asked for first."""
    return [name for name in points if not name.startswith(("seed", "complement", "raw", "draw-h"))]


def groups(points: Sequence[str]) -> dict[str, list[list[str]]]:
    """What is compared: by title, several means over points that say the same of a method."""
    have = set(points)

    def numbered(name: str) -> list[str]:
        return [p for p in points if p.rpartition("-")[0] == name]

    def cut(names: list[str], size: int) -> list[list[str]]:
        return [names[i : i + size] for i in range(0, len(names) - size + 1, size)]

    draws, pairs = numbered("draw"), len(numbered("complement"))
    both = [f"{kind}-{k}" for k in range(pairs) for kind in ("draw", "complement")]
    found = {
        "all weights 1": [["whole"]],
        "all weights 1/2": [["half"]],
        "the rate over the root of 2": [["rate0.707107"]],
        "half the rate": [["rate0.5"]],
        "a quarter of the rate": [["rate0.25"]],
        "an eighth of the rate": [["rate0.125"]],
        "all weights 1/2, expected second moments": [["spread"]],
        "expected second moments, held": [["held"]],
        "half the rate, expected second moments": [["spread-slow"]],
        "half the rate, expected second moments, held": [["held-slow"]],
        **{
            f"the same, by {count} sums with random signs": [[f"signs{count}-slow"]]
            for count in (1, 4, 16)
        },
    }
    for size in (1, 2, 4, 8, 16):
        found[f"random halves, {size}"] = cut(draws, size)
    for size in (1, 2, 4, 8):
        found[f"halves and their complements, {2 * size}"] = cut(both, 2 * size)
    for size in (1, 4):
        found[f"random halves at half the rate, {size}"] = cut(numbered("draw-slow"), size)
        found[f"random halves, expected second moments, held, {size}"] = cut(
            numbered("draw-held"), size
        )
        found[f"random halves, every coordinate, {size}"] = cut(numbered("raw"), size)
    for size in (1, 4, 8):
        found[f"fresh seeds, all weights 1, {size}"] = cut(numbered("seed-whole"), size)
        found[f"fresh seeds, a random half each, {size}"] = cut(numbered("seed-draw"), size)
        found[f"fresh seeds, half the rate, {size}"] = cut(numbered("seed-slow"), size)
        found[f"fresh seeds, half the rate, expected second moments, held, {size}"] = cut(
            numbered("seed-held-slow"), size
        )
        found[f"fresh seeds, a quarter of the rate, {size}"] = cut(numbered("seed-slower"), size)
    return {
        title: [g for g in some if have.issuperset(g)]
        for title, some in found.items()
        if some and have.issuperset(some[0])
    }


def lds(tiny: Tiny, some: Sequence[Sequence[str]], protocol: str, share: str) -> list[Tensor]:
    """LDS of each query, for each of several means over points."""
    truth = tiny.truth[protocol, share]
    found = []
    for group in some:
        predicted = torch.stack([tiny.removed[share][name] for name in group]).mean(0)
        found.append(rank_correlation(predicted, truth))
    return found


def ceiling(seeds: Tensor) -> float:
    """How well a mean over these seeds, [seed, query, subset], could be ranked by its own
    expectation.

    The reliability of the mean by Spearman and Brown's formula, from the mean correlation of two
    seeds; its root. All subsets share the seeds here, so what a seed adds to all of them is no
    noise: the halves of :func:`~tda_lightning.evaluation.ceilings.seed_ceiling`, drawn anew for
    every subset, would count it as such.
    """
    count = len(seeds)
    pairs = [rank_correlation(seeds[i], seeds[j]).nanmean() for i in range(count) for j in range(i)]
    one = float(torch.stack(pairs).mean())
    return max(0.0, count * one / (1 + (count - 1) * one)) ** 0.5


def table(tiny: Tiny) -> str:
    """A row for each way of choosing the point, in markdown."""
    asked = [(p, s) for p in PROTOCOLS for s in ASKED if (p, s) in tiny.truth]
    heads = [f"{PROTOCOLS[p]}, {float(s):.0%} kept" for p, s in asked]
    lines = [f"| derivative at | replays | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for title, some in groups(tiny.points).items():
        cells = []
        for protocol, share in asked:
            each = lds(tiny, some, protocol, share)
            found = bootstrap(torch.stack(each).mean(0))
            text = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
            if len(each) > 1:
                means = [float(one.nanmean()) for one in each]
                text += f"; {min(means):.2f} to {max(means):.2f}"
            cells.append(text)
        lines.append(f"| {title} | {len(some[0])} | {' | '.join(cells)} |")
    tops = [f"{ceiling(tiny.seeds[s]):.3f}" if p == "fresh" else "" for p, s in asked]
    lines.append(f"| *ceiling of the truth* | | {' | '.join(tops)} |")
    return "\n".join(lines)


def luck(results: Mapping[str, Tiny]) -> str:
    """How far two seeds' predictions agree, and what the luck of one seed costs, in markdown.

    A prediction that is the expectation over seeds plus the luck of one ranks the truth less well
    by the root of the agreement of two (Spearman 1904); so much the mean over many seeds gains.
    """
    ways = {
        "all weights 1": ("whole", "seed-whole"),
        "half the rate": ("rate0.5", "seed-slow"),
        "half the rate, expected second moments, held": ("held-slow", "seed-held-slow"),
        "a quarter of the rate": ("rate0.25", "seed-slower"),
    }
    lines = [
        "| problem | derivative at | seeds | two seeds agree | LDS, one seed | all seeds | "
        "without luck |",
        "|---" * 7 + "|",
    ]
    for name, tiny in results.items():
        for said, (recorded, fresh) in ways.items():
            names = [recorded, *(p for p in tiny.points if p.rpartition("-")[0] == fresh)]
            if len(names) == 1:
                continue
            sums = [tiny.removed["0.5"][point] for point in names]
            pairs = [rank_correlation(a, b).nanmean() for i, a in enumerate(sums) for b in sums[:i]]
            agreed = float(torch.stack(pairs).mean())
            one = float(torch.stack(lds(tiny, [[n] for n in names], "fresh", "0.5")).nanmean())
            whole = float(lds(tiny, [names], "fresh", "0.5")[0].nanmean())
            lines.append(
                f"| {TITLES[name]} | {said} | {len(names)} | {agreed:.2f} | {one:.3f} | "
                f"{whole:.3f} | {one / agreed**0.5:.2f} |"
            )
    return "\n".join(lines)


def interval(found: Interval) -> str:
    """Short, for tables."""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def tables(folder: Path) -> Mapping[str, str]:
    """Of every problem with results."""
    files = {name: folder / f"adamw_{name}.npz" for name in TITLES}
    return {name: table(load(file)) for name, file in files.items() if file.exists()}


if __name__ == "__main__":
    for name, text in tables(Path(__file__).parent / "results").items():
        print(f"### {TITLES[name]}\n\n{text}\n")
