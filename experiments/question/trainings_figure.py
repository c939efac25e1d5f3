"""The picture and the table of LDS against the trainings paid for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

import torch
from torch import Tensor

from experiments.question.kept import COUNTS as FIRST
from experiments.question.kept import load
from experiments.question.studies import TITLES
from experiments.question.tiny_table import interval
from experiments.question.trainings import (
    COUNTS,
    MEMBERS,
    OUTSIDE,
    POOLED,
    SERIES,
    Series,
    read,
)
from tda_lightning.evaluation.linear_datamodeling import bootstrap

ORDER = (*SERIES, *POOLED, OUTSIDE)
DEFAULT = (Series("source", "seeds", 1), *(Series("source", kind, 0.5) for kind in MEMBERS))
NAMES = TITLES | {"trak": "TRAK", "kronfluence": "kronfluence, EK-FAC"}
KINDS = {
    "seeds": "independent runs",
    "forks": "forks",
    "dropout": "dropout masks",
    "lora": "adapters",
}
COLOURS = {"seeds": "#1f5fa8", "forks": "#c2571a", "dropout": "#2c8a57", "lora": "#8a3d96"}
DASHES = {"source": "16 2", "influence": "", "source_blocks": "8 3", "tracin": "2 3", "trak": "1 5"}
FORKED = (0.5, 0.25)  # share of the run that a fork trains, in turns
ADAPTED = 0.2  # share of the run's epochs that adapters train
WIDTH, HEIGHT, LEFT, TOP, RIGHT = 1020, 540, 60, 30, 560


def trainings(series: Series, count: int) -> float:
    """Runs that ``count`` members cost, the recorded one and what-if runs included.

    Example:
        >>> trainings(Series("influence", "forks", 1), 3)
        1.75
    """
    made = {
        "seeds": float(count),
        "forks": 1 + sum(FORKED[number % 2] for number in range(count - 1)),
        "dropout": 1.0,
        "lora": 1 + ADAPTED * count,
    }[series.kind]
    if series.keep == 1:
        return made
    # Masks share one what-if run, what-if runs of forks the past that forks have in common.
    return made + {"dropout": 1, "forks": made}.get(series.kind, count)


def found() -> dict[Series, dict[int, Tensor]]:
    """LDS [query] for training anew, by series and number of members: SOURCE's by ``run.py``."""
    arrays, about = read()
    first = load("mnist").first
    default = {
        series: dict(zip(FIRST, first[str(series), "algorithm"], strict=True))
        for series in DEFAULT
        if (str(series), "algorithm") in first
    }
    return default | {
        series: dict(
            zip(
                about[str(series)],
                torch.from_numpy(arrays[f"algorithm-{series}"]).double(),
                strict=True,
            )
        )
        for series in ORDER
        if str(series) in about
    }


def table(series_of: Mapping[Series, Mapping[int, Tensor]]) -> str:
    """LDS by number of members, with the trainings that they cost."""
    heads = [f"{count} member{'s' * (count > 1)}" for count in COUNTS]
    lines = [f"| scores | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for series, of in series_of.items():
        cells = [
            f"{interval(bootstrap(of[count]))}, {trainings(series, count):g}" if count in of else ""
            for count in COUNTS
        ]
        lines.append(f"| {named(series)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def named(series: Series) -> str:
    """For the table and the picture."""
    at = "" if series.keep == 1 else f", keep={series.keep:g}"
    return f"{NAMES[series.estimator]}{at}, {KINDS[series.kind]}"


def picture(series_of: Mapping[Series, Mapping[int, Tensor]], ceiling: float) -> str:
    """LDS for training anew against trainings, the latter on a logarithmic axis."""
    means = {s: {k: float(v.nanmean()) for k, v in of.items()} for s, of in series_of.items()}
    most = max(trainings(series, count) for series, of in means.items() for count in of)
    bottom = HEIGHT - 50

    def x(cost: float) -> float:
        return LEFT + math.log(cost) / math.log(most) * (RIGHT - LEFT)

    def y(value: float) -> float:
        return bottom - max(value, 0) * (bottom - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18">LDS, half kept, training anew</text>',
        f'<text x="{RIGHT}" y="{HEIGHT - 12}" text-anchor="end">trainings paid for</text>',
    ]
    for step in range(0, 11, 2):
        at = y(step / 10)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{step / 10}</text>')
    for cost in (1, 2, 5, 10, 20):
        if cost <= most:
            parts.append(
                f'<text x="{x(cost):.1f}" y="{bottom + 18}" text-anchor="middle">{cost}</text>'
            )
    at = y(ceiling)
    parts.append(f'<path d="M{LEFT} {at:.1f}H{RIGHT}" stroke="#888" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{LEFT}" y="{at - 6:.1f}">ceiling of the truth</text>')
    for place, (series, of) in enumerate(means.items()):
        colour = COLOURS[series.kind]
        dashes = DASHES.get(series.estimator, "10 3 2 3")
        width = 2.5 if series.keep < 1 else 1.3
        style = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"'
        points = [(x(trainings(series, count)), y(value)) for count, value in of.items()]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        parts.append(f'<path d="M{path}" {style}/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in points]
        line = TOP + 10 + 19 * place
        parts.append(f'<path d="M{RIGHT + 10} {line - 4}h26" {style}/>')
        parts.append(
            f'<text x="{RIGHT + 42}" y="{line}" font-size="11">{escape(named(series))}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])
