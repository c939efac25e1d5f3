"""Gradient clipping, and hooks that change gradients, in words for the provenance of scores."""

from __future__ import annotations

from tda_lightning.records.trajectory import Trajectory

_CLIPPED = {
    "norm": "Gradient clipping by norm",
    "value": "Gradient clipping by value",
    "own": "The module's own gradient clipping",
    "hooks": "Hooks that change gradients (on_after_backward, on_before_optimizer_step)",
}


def clipping_notes(trajectory: Trajectory, neglected: str | None = None) -> list[str]:
    """What gradient clipping did in the run, and how the formula treats it.

    Args:
        neglected: why it leaves clipping out; None where it multiplies each step's gradients by
            the step's factor.
    """
    settings, steps = trajectory.facts.settings, trajectory.steps
    if settings.get("gradient_clip_val") and "clipping" not in settings:
        return [
            f"Gradients were clipped at {settings['gradient_clip_val']} during training, and what "
            "clipping did to them is not recorded; the formula takes the steps as unclipped."
        ]
    acted = steps.clipping != 1
    if not bool(acted.any()):
        return []
    kind = str(settings.get("clipping", "norm"))
    said = (
        f"{_CLIPPED.get(kind, _CLIPPED['own'])} acted in {int(acted.sum())} of {len(steps)} steps, "
        f"mean factor {float(steps.clipping[acted].mean()):.2g}"
    )
    if neglected is not None:
        return [f"{said}: neglected, {neglected}."]
    rest = "that the factor depends on the gradients is neglected"
    if kind == "hooks":
        rest = "that they may also turn a gradient, and how that depends on it, is neglected"
    elif kind != "norm":
        rest = "that clipping also turns a gradient, and how it depends on it, is neglected"
    return [f"{said}: each step's gradients count times the step's factor; {rest}."]
