"""Recall by k, and correlation by time, as one picture: SVG without scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape

from experiments.fastif.kept import load

Scale = Callable[[float], float]

WIDTH, HEIGHT = 820, 300
LEFTS, SIDE, TOP, BOTTOM = (50, 455), 300, 40, 250
COLOURS = {"helpful": "#2f7fb5", "harmful": "#d1622b"}
DAMPINGS = {"paper": ("#0b4f8a", "published damping"), "none": ("#d1622b", "weight decay alone")}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.axis{stroke:#bbb}.small{font-size:10px}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.axis{stroke:#555}.back{fill:#161616}}"
)


def figure() -> str:
    """Left: recall of the ten largest exact influences; right: what the solver's time buys."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Recall of true influences among neighbours, and correlation by time">'
        f'<style>{STYLE}</style><rect class="back" width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
        + "".join([*_recall(), *_quality()])
        + "</svg>\n"
    )


def _recall() -> Iterable[str]:
    kept = list(load("recall_exact").values())
    ks, count = kept[0]["ks"], kept[0]["num_train"]
    x, y = _logarithmic(LEFTS[0], ks[0], ks[-1]), _shares
    yield from _frame(LEFTS[0], "recall of the 10 largest among k neighbours", ks, x, "k")
    for number, row in enumerate(kept[0]["rows"]):
        if row["top"] != 10:
            continue
        values = [
            sum(one["rows"][number]["recall"][n][0] for one in kept) / len(kept)
            for n in range(len(ks))
        ]
        dashed = row["queries"] == "hans"
        said = f"{row['queries']}, {row['sign']}"
        yield _line([x(k) for k in ks], [y(v) for v in values], COLOURS[row["sign"]], dashed, said)
    yield _line([x(k) for k in ks], [y(k / count) for k in ks], "#888888", False, "by chance")
    names = [("#2f7fb5", "helpful"), ("#d1622b", "harmful"), ("#888888", "by chance")]
    yield from _legend(LEFTS[0], [*names, (None, "dashed: HANS-like queries")])


def _quality() -> Iterable[str]:
    (kept,) = load("quality").values()
    times = [row["seconds"] for row in kept["rows"]]
    low, high = 10 ** math.floor(math.log10(min(times))), 10 ** math.ceil(math.log10(max(times)))
    x = _logarithmic(LEFTS[1], low, high)
    ticks = [low * 10**n for n in range(round(math.log10(high / low)) + 1)]
    yield from _frame(LEFTS[1], "Spearman with exact, by seconds for a query", ticks, x, "s")
    for row in kept["rows"]:
        colour, name = DAMPINGS[row["damping"]]
        value, left, right = (max(0.0, one) for one in row["spearman"])
        said = f"{name}: depth {row['depth']}, batch {row['batch']}: {value:.3f}"
        at = x(row["seconds"])
        yield (
            f'<g><title>{escape(said)}</title><line x1="{at:.1f}" x2="{at:.1f}" '
            f'y1="{_shares(left):.1f}" y2="{_shares(right):.1f}" stroke="{colour}"/>'
            f'<circle cx="{at:.1f}" cy="{_shares(value):.1f}" r="3" fill="{colour}"/>'
            f'<text class="small" x="{at + 5:.1f}" y="{_shares(value) + 10:.1f}">'
            f"{row['depth']}x{row['batch']}</text></g>"
        )
    yield from _legend(LEFTS[1], [*DAMPINGS.values(), (None, "depth x batch")])


def _logarithmic(left: float, low: float, high: float) -> Scale:
    return lambda value: left + SIDE * math.log(value / low) / math.log(high / low)


def _shares(value: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * value


def _frame(left: float, title: str, ticks: Iterable[float], x: Scale, unit: str) -> Iterable[str]:
    yield f'<text x="{left}" y="16">{escape(title)}</text>'
    for fifth in range(6):
        at = _shares(fifth / 5)
        yield (
            f'<line class="axis" x1="{left}" x2="{left + SIDE}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="small" x="{left - 6}" y="{at + 3:.1f}" text-anchor="end">'
            f"{fifth / 5:g}</text>"
        )
    for value in ticks:
        yield (
            f'<text class="small" x="{x(value):.1f}" y="{BOTTOM + 14}" text-anchor="middle">'
            f"{value:g}</text>"
        )
    yield f'<text class="small" x="{left + SIDE + 18}" y="{BOTTOM + 14}">{unit}</text>'


def _line(xs: list[float], ys: list[float], colour: str, dashed: bool, said: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    dash = ' stroke-dasharray="5 3"' if dashed else ""
    return (
        f'<g><title>{escape(said)}</title><polyline points="{points}" fill="none" '
        f'stroke="{colour}" stroke-width="2"{dash}/></g>'
    )


def _legend(left: float, entries: Iterable[tuple[str | None, str]]) -> Iterable[str]:
    at = float(left)
    for colour, said in entries:
        if colour is not None:
            yield f'<circle cx="{at + 4:.0f}" cy="{HEIGHT - 16}" r="4" fill="{colour}"/>'
        yield f'<text class="small" x="{at + 12:.0f}" y="{HEIGHT - 12}">{escape(said)}</text>'
        at += 24 + 6 * len(said)
