"""What scores say of the curvature that they come from."""

from __future__ import annotations

from collections.abc import Sequence

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
