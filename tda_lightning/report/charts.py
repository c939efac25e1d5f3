"""The geometry of the report's charts; the page's template draws them as SVG.

Neither plotly nor matplotlib: a plotly page carries megabytes of JavaScript, and a matplotlib
figure fixes its colours where these few bars and lines follow the page's light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where it stands in the drawing, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """A rectangle; ``kind`` is its class in the style sheet, ``text`` shows on hovering."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    text: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing of ``width`` x ``height``; the plot lies between ``left``, ``top``, ``right`` and
    ``bottom``. ``lines`` are paths, ``bands`` lie behind them, ``marks`` stand on the x axis."""

    width: float
    height: float
    left: float
    top: float
    right: float
    bottom: float
    zero: float
    x_ticks: tuple[Tick, ...] = ()
    y_ticks: tuple[Tick, ...] = ()
    bars: tuple[Bar, ...] = ()
    bands: tuple[Bar, ...] = ()
    lines: tuple[str, ...] = ()
    marks: tuple[Tick, ...] = ()


def number(value: float, signed: bool = False, among: float | None = None) -> str:
    """Three significant digits, with powers of ten for small and large numbers.

    Args:
        value: the number.
        signed: write a plus, too.
        among: the largest of the numbers beside it, so that all are written alike.

    Example:
        >>> number(0.0021), number(3.4e-7, signed=True)
        ('0.00210', '+3.40·10⁻⁷')
    """
    if value == 0:
        return "0"
    if not math.isfinite(value):  # a sum of finite scores may overflow
        return str(value)
    reference = f"{abs(value if among is None or math.isinf(among) else among):.2e}"
    sign = "\N{MINUS SIGN}" if value < 0 else "+" if signed else ""
    size = f"{abs(value):.2e}"
    mantissa, exponent = size[:4], int(size[5:])
    if -3 <= int(reference[5:]) < 5:
        return f"{sign}{float(size):.{max(0, 2 - exponent)}f}"
    raised = str(exponent).translate(_RAISED)
    return f"{sign}{mantissa}·10{raised}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``.

    Example:
        >>> ticks(0, 0.1)
        [0.0, 0.025, 0.05, 0.075, 0.1]
    """
    # Beyond these, the differences of float64 are 0 or infinite; NaN compares as neither.
    if not 1e-300 < high - low < 1e300:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((1, 2, 2.5, 5, 10), key=lambda size: abs(size * power - rough)) * power
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.6g}") for index in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's number, without needless zeros."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
    if not math.isfinite(value):
        return str(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    trimmed = mantissa.rstrip("0").rstrip(".").replace("-", "\N{MINUS SIGN}")
    raised = str(int(exponent)).translate(_RAISED)
    return f"{trimmed}·10{raised}"


def bar_chart(
    series: Sequence[tuple[str, str, Sequence[float]]], labels: Sequence[str], width: float = 340
) -> Chart:
    """Signed bars side by side, one group for each label.

    Args:
        series: name, style class and one value per label, for each series.
        labels: names of the groups.
        width: of the drawing.
    """
    height, left, top, right, bottom = 168.0, 62.0, 8.0, width - 6, 142.0
    values = [value for _, _, numbers in series for value in numbers]
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.06 * (high - low) or 1.0
    low, high = low - room * (low < 0), high + room * (high > 0 or low == high)
    y = _scale(low, high, bottom, top)
    slot = (right - left) / len(labels)
    thick = min(26.0, 0.72 * slot / len(series))
    bars = []
    for position, (name, kind, numbers) in enumerate(series):
        for group, (label, value) in enumerate(zip(labels, numbers, strict=True)):
            centre = left + slot * (group + 0.5) + thick * (position - len(series) / 2)
            ends = sorted((y(0), y(value)))
            text = f"{name}, {label}: {number(value, signed=True)}"
            bars.append(Bar(centre, ends[0], 0.92 * thick, ends[1] - ends[0], kind, text))
    every = math.ceil(len(labels) * 7.0 * max(map(len, labels)) / (right - left))
    x_ticks = tuple(
        Tick(left + slot * (group + 0.5), label)
        for group, label in enumerate(labels)
        if group % every == 0
    )
    y_ticks = tuple(Tick(y(value), short(value)) for value in ticks(low, high))
    return Chart(width, height, left, top, right, bottom, y(0), x_ticks, y_ticks, bars=tuple(bars))


def sparkline(values: Sequence[float], scale: float) -> Chart:
    """Tiny signed bars; ``scale`` is the value that fills half of the height."""
    width, height = 64.0, 24.0
    y = _scale(-scale, scale, height, 0.0) if scale > 0 else (lambda value: height / 2)
    slot = width / len(values)
    bars = []
    for position, value in enumerate(values):
        ends = sorted((y(0), y(max(-scale, min(scale, value)))))
        kind = "proponent" if value >= 0 else "opponent"
        bars.append(Bar(slot * position, ends[0], 0.8 * slot, ends[1] - ends[0], kind))
    return Chart(width, height, 0, 0, width, height, y(0), bars=tuple(bars))


def line_chart(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
    bands: Sequence[tuple[float, float, str]] = (),
    marks: Sequence[tuple[float, str]] = (),
    width: float = 560,
    height: float = 240,
) -> Chart:
    """Lines from zero upwards over the same axis.

    Args:
        curves: x and y of each line, x increasing.
        bands: start, end and name of stretches of the x axis.
        marks: places on the x axis and what they say on hovering.
    """
    left, top, right, bottom = 62.0, 26.0, width - 10, height - 26
    last = max(float(xs[-1]) for xs, _ in curves)
    first = min(float(at) for at in (*(xs[0] for xs, _ in curves), *(at for at, _ in marks)))
    low = min(0.0, *(min(ys) for _, ys in curves))
    high = max(0.0, *(max(ys) for _, ys in curves))
    x = _scale(first, max(last, first + 1), left, right)
    y = _scale(low, high + (0.06 * (high - low) or 1.0), bottom, top)
    paths = []
    for xs, ys in curves:
        points = _thin(xs, ys, 600)
        paths.append("M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points))
    stretches = tuple(
        Bar(x(start), top, x(stop) - x(start), bottom - top, f"band-{place % 2}", name)
        for place, (start, stop, name) in enumerate(bands)
    )
    return Chart(
        width,
        height,
        left,
        top,
        right,
        bottom,
        y(0),
        tuple(Tick(x(at), short(at)) for at in ticks(first, last, 8)),
        tuple(Tick(y(at), short(at)) for at in ticks(low, high * 1.05)),
        bands=stretches,
        lines=tuple(paths),
        marks=tuple(Tick(x(at), text) for at, text in marks),
    )


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _thin(xs: Sequence[float], ys: Sequence[float], limit: int) -> list[tuple[float, float]]:
    """At most about ``limit`` points; the extremes of every stretch stay."""
    points = list(zip(xs, ys, strict=True))
    if len(points) <= limit:
        return points
    stretch = math.ceil(2 * len(points) / limit)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        extremes = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(extremes)
    return [points[0], *kept, points[-1]]
