"""Lines over shares, and points against a diagonal, as SVG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from tda_lightning.report.charts import short, ticks

COLOURS = ("#1f5fa8", "#c2571a", "#2a8a4a", "#8a4fa8", "#777777")
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 430.0, 16.0, 290.0


class _Plot:
    """A frame with ticks, and where a pair of numbers stands in it."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], width: int) -> None:
        self.width = width
        self.x0, self.x1 = _widened(xs)
        self.y0, self.y1 = _widened(ys)
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 340" width="{width}" '
            'font-family="sans-serif" font-size="12" fill="#222">',
            f'<rect width="{width}" height="340" fill="#fff"/>',
        ]

    def at(self, x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - self.x0) / (self.x1 - self.x0) * (_RIGHT - _LEFT),
            _BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (_BOTTOM - _TOP),
        )

    def frame(self, x_title: str, y_title: str) -> None:
        for value in ticks(self.x0, self.x1):
            x, _ = self.at(value, self.y0)
            self.parts.append(f'<path d="M{x:.1f} {_TOP}V{_BOTTOM}" stroke="#e4e4e4"/>')
            self.text(x, _BOTTOM + 16, short(value), "middle")
        for value in ticks(self.y0, self.y1):
            _, y = self.at(self.x0, value)
            self.parts.append(f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="#e4e4e4"/>')
            self.text(_LEFT - 6, y + 4, short(value), "end")
        self.text((_LEFT + _RIGHT) / 2, _BOTTOM + 38, x_title, "middle")
        middle = (_TOP + _BOTTOM) / 2
        self.parts.append(
            f'<text transform="translate(16 {middle:g}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_title)}</text>"
        )

    def text(self, x: float, y: float, words: str, anchor: str = "start") -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def path(self, points: Sequence[tuple[float, float]], colour: str, dashes: str = "") -> None:
        places = "L".join(f"{x:.1f} {y:.1f}" for x, y in (self.at(*point) for point in points))
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.parts.append(
            f'<path d="M{places}" fill="none" stroke="{colour}" stroke-width="1.8"{dashed}/>'
        )

    def done(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def lines(
    xs: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    levels: Mapping[str, float],
    x_title: str,
    y_title: str,
) -> str:
    """One line for each of ``curves``; ``levels`` are dashed lines across."""
    plot = _Plot(xs, [*levels.values(), *(y for ys in curves.values() for y in ys)], 640)
    plot.frame(x_title, y_title)
    ends = []
    for (name, ys), colour in zip(curves.items(), COLOURS, strict=True):
        plot.path(list(zip(xs, ys, strict=True)), colour)
        ends.append((plot.at(xs[-1], ys[-1])[1], name, colour))
    for name, level in levels.items():
        plot.path([(xs[0], level), (xs[-1], level)], "#222", "5 4")
        ends.append((plot.at(xs[-1], level)[1], name, "#222"))
    place = 0.0
    for y, name, colour in sorted(ends):
        place = max(place + 15, y)
        plot.parts.append(
            f'<text x="{_RIGHT + 6}" y="{place + 4:.1f}" fill="{colour}">{escape(name)}</text>'
        )
    return plot.done()


def scatter(xs: Sequence[float], ys: Sequence[float], x_title: str, y_title: str) -> str:
    """Points, and the line on which prediction and measurement are equal."""
    plot = _Plot([*xs, 0.0], [*ys, 0.0], 450)
    plot.frame(x_title, y_title)
    low, high = max(plot.x0, plot.y0), min(plot.x1, plot.y1)
    plot.path([(low, low), (high, high)], "#888", "5 4")
    for pair in zip(xs, ys, strict=True):
        x, y = plot.at(*pair)
        plot.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{COLOURS[0]}"/>')
    return plot.done()


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with some room at both ends."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room
