"""LDS by what is asked and where the derivative is taken, as pictures in SVG without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

CELL, LEFT, TOP, GAP = 46, 70, 70, 34
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.small{font-size:10px}.cell{font-size:11px}"
    ".dark{fill:#fff}.light{fill:#111}.best{stroke:#d1622b;stroke-width:2.5;fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.light{fill:#111}.back{fill:#161616}}"
)
Map = Mapping[tuple[str, str], float]


def heat_maps(maps: Mapping[str, Map], columns: Sequence[str], rows: Sequence[str]) -> str:
    """A square for each title: a column for each share kept, a row for each ``keep``.

    Args:
        maps: by title, LDS by (column, row); what is missing stays white.
        columns: shares of the training set that stay in what is predicted.
        rows: mean weights at which the derivative was taken.
    """
    across = 3
    width_of_one = LEFT + CELL * len(columns) + GAP
    height_of_one = TOP + CELL * len(rows) + GAP
    parts = []
    for place, (title, found) in enumerate(maps.items()):
        x0 = place % across * width_of_one + LEFT
        y0 = place // across * height_of_one + TOP
        parts.append(f'<text x="{x0 - 50}" y="{y0 - 44}">{escape(title)}</text>')
        parts.append(f'<text class="small" x="{x0}" y="{y0 - 26}">share kept</text>')
        parts.append(f'<text class="small" x="{x0 - 50}" y="{y0 - 10}">keep</text>')
        for i, column in enumerate(columns):
            x = x0 + CELL * (i + 0.5)
            parts.append(
                f'<text class="small" x="{x}" y="{y0 - 10}" text-anchor="middle">{column}</text>'
            )
        for j, row in enumerate(rows):
            y = y0 + CELL * (j + 0.5) + 4
            parts.append(f'<text class="small" x="{x0 - 40}" y="{y}">{row}</text>')
        for i, column in enumerate(columns):
            known = [found[column, row] for row in rows if (column, row) in found]
            for j, row in enumerate(rows):
                if (column, row) not in found:
                    continue
                value = found[column, row]
                x, y = x0 + CELL * i, y0 + CELL * j
                shade = "dark" if value > 0.55 else "light"
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{colour(value)}"/>'
                    f'<text class="cell {shade}" x="{x + CELL / 2}" y="{y + CELL / 2 + 4}" '
                    f'text-anchor="middle">{value:.2f}</text>'
                )
                if value == max(known):
                    parts.append(
                        f'<rect class="best" x="{x + 2}" y="{y + 2}" width="{CELL - 4}" '
                        f'height="{CELL - 4}"/>'
                    )
    width = min(across, len(maps)) * width_of_one
    height = -(-len(maps) // across) * height_of_one
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img"><title>LDS by share kept and by keep</title>'
        f'<style>{STYLE}</style><rect class="back" width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def colour(value: float) -> str:
    """From white at 0 to dark blue at 1."""
    share = min(1.0, max(0.0, value))
    ends = (247, 251, 255), (8, 48, 107)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(*ends, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"
