"""What scores say of the curvature that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tda_lightning.curvature import uses_statistics
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.trajectory import Trajectory


def about_statistics(
    choice: str, kind: str, trajectory: Trajectory, spans: Sequence[tuple[int, int]]
) -> Provenance:
    """Provenance of curvature that was recorded in training over ``spans`` of steps; empty where
    it was fitted."""
    if not uses_statistics(choice, kind, trajectory):
        return {}
    merged = [trajectory.merged_statistics(*span).values() for span in spans]
    examples = [max((int(block.examples) for block in blocks), default=0) for blocks in merged]
    return {
        "statistics": {
            "gathered": "in training",
            "eigenvalues": "one pass" if choice == "corrected" else "products, by recorded trace",
            "examples": examples,
        },
        "fisher": trajectory.facts.settings.get("curvature", {}).get("fisher"),
    }


def about_stage_statistics(
    choice: str,
    kind: str,
    stages: Sequence[Trajectory],
    spans: Sequence[Sequence[tuple[int, int]]],
) -> dict[str, Any]:
    """The same of several stages, some of which may have had theirs fitted: one entry each, None
    for those; empty where all were fitted."""
    found = [
        about_statistics(choice, kind, stage, own) for stage, own in zip(stages, spans, strict=True)
    ]
    if not any(found):
        return {}
    return {key: [one.get(key) for one in found] for key in ("statistics", "fisher")}
