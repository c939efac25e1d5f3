"""Means with their intervals as dots and whiskers, as an SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tda_lightning.evaluation import Interval
from tda_lightning.report.charts import short, ticks

COLOURS = ("#1f5fa8", "#c2571a")
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 720, 320.0, 700.0, 44.0, 26.0


def dots(
    rows: Sequence[tuple[str, Sequence[Interval | None]]], series: Sequence[str], title: str
) -> str:
    """One row for each name, one dot with its whisker for each of the series."""
    known = [item for _, items in rows for item in items if item is not None]
    low = min(0.0, *(item.low for item in known))
    high = max(item.high for item in known)
    bottom = _TOP + _ROW * len(rows)

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 44:g}" '
        f'width="{_WIDTH}" font-family="sans-serif" font-size="13" fill="#222">',
        f'<rect width="{_WIDTH}" height="{bottom + 44:g}" fill="#fff"/>',
    ]
    for place, (name, colour) in enumerate(zip(series, COLOURS, strict=False)):
        at = _LEFT + 160 * place
        parts.append(f'<circle cx="{at + 5:g}" cy="20" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{at + 15:g}" y="24">{escape(name)}</text>')
    for value in ticks(low, high):
        at = x(value)
        stroke = "#888" if value == 0 else "#ddd"
        parts.append(f'<path d="M{at:.1f} {_TOP:g}V{bottom:g}" stroke="{stroke}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{bottom + 16:g}" text-anchor="middle">{short(value)}</text>'
        )
    middle = (_LEFT + _RIGHT) / 2
    parts.append(
        f'<text x="{middle:g}" y="{bottom + 36:g}" text-anchor="middle">{escape(title)}</text>'
    )
    for number, (name, items) in enumerate(rows):
        centre = _TOP + _ROW * (number + 0.5)
        parts.append(
            f'<text x="{_LEFT - 12:g}" y="{centre + 4:g}" text-anchor="end">{escape(name)}</text>'
        )
        for place, (item, colour) in enumerate(zip(items, COLOURS, strict=False)):
            if item is None:
                continue
            at = centre + 8 * (place - (len(series) - 1) / 2)
            parts.append(
                f'<path d="M{x(item.low):.1f} {at:g}H{x(item.high):.1f}" stroke="{colour}" '
                'stroke-width="2"/>'
                f'<circle cx="{x(item.value):.1f}" cy="{at:g}" r="3.5" fill="{colour}">'
                f"<title>{escape(name)}: {item}</title></circle>"
            )
    return "\n".join([*parts, "</svg>"]) + "\n"
