"""The linear datamodeling scores of all studies as one picture, in SVG without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from experiments.fidelity.studies import STUDIES, TITLES

if TYPE_CHECKING:
    from experiments.fidelity.table import Row

SHOWN = {
    "unrolled": "exact unrolling",
    "source_recorded": "SOURCE, recorded order",
    "source": "SOURCE",
    "source_blocks": "SOURCE, blocks alone",
    "influence": "influence function, best damping",
    "trak": "TRAK",
    "tracin": "TracIn",
    "gradient_dot": "gradient dot product",
}
COLOURS = {
    "unrolled": "#7a5195",
    "source_recorded": "#2f7fb5",
    "source": "#0b4f8a",
    "source_blocks": "#63c1c7",
    "influence": "#d1622b",
    "trak": "#8a8a2f",
    "tracin": "#5b9a4a",
    "gradient_dot": "#888888",
}
LEFT, RIGHT, LINE, GAP, TOP = 230, 700, 13, 26, 64
WORDS = {"single_run": "single run", "algorithm": "algorithm"}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.axis{stroke:#bbb}.small{font-size:10px}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.axis{stroke:#555}.back{fill:#161616}}"
)


def figure(tables: Mapping[str, Sequence[Row]]) -> str:
    """A row for each study and protocol, in it a mark with its interval for each estimator."""
    shown = [row for table in tables.values() for row in table if row.name in SHOWN]
    low = min(0.0, *(found.low for row in shown for found in row.lds.values()))
    parts, y = [], float(TOP)

    def x(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - low) / (1 - low)

    for name, table in tables.items():
        drawn = {row.name: row for row in table if row.name in SHOWN}
        # Of a grid of dampings the best comes last.
        drawn = {key: drawn[key] for key in SHOWN if key in drawn}
        for protocol in table[0].lds:
            title = STUDIES[name].title
            parts.append(f'<text x="8" y="{y + 12:.0f}">{escape(title[:36])}</text>')
            parts.append(f'<text class="small" x="8" y="{y + 26:.0f}">{WORDS[protocol]}</text>')
            for row in drawn.values():
                found = row.lds[protocol]
                colour, said = COLOURS[row.name], f"{TITLES[row.name]}: {found}"
                parts.append(
                    f'<g><title>{escape(said)}</title><line x1="{x(found.low):.1f}" '
                    f'x2="{x(found.high):.1f}" y1="{y + 6:.1f}" y2="{y + 6:.1f}" '
                    f'stroke="{colour}" stroke-width="2"/><circle cx="{x(found.value):.1f}" '
                    f'cy="{y + 6:.1f}" r="4" fill="{colour}"/></g>'
                )
                y += LINE
            y += max(0, 36 - LINE * len(drawn)) + GAP
    axis = []
    for tenth in range(round(low * 10), 11, 2):
        at = x(tenth / 10)
        axis.append(
            f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 10}" y2="{y:.0f}"/>'
            f'<text class="small" x="{at:.1f}" y="{TOP - 16}" text-anchor="middle">'
            f"{tenth / 10:g}</text>"
        )
    legend = []
    for place, (key, said) in enumerate(SHOWN.items()):
        column, line = place % 4, place // 4
        at = 8 + column * 178
        legend.append(
            f'<circle cx="{at + 4}" cy="{12 + 16 * line}" r="4" fill="{COLOURS[key]}"/>'
            f'<text class="small" x="{at + 12}" y="{16 + 16 * line}">{escape(said)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {y:.0f}" role="img" '
        'aria-label="Linear datamodeling scores by study, protocol and estimator">'
        f'<style>{STYLE}</style><rect class="back" width="720" height="{y:.0f}" fill="#fff"/>'
        + "".join([*axis, *legend, *parts])
        + "</svg>\n"
    )
