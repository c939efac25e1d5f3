"""How unevenly a run used its examples, in words for the provenance of scores."""

from __future__ import annotations

from tda_lightning.records.example_use import draw_counts
from tda_lightning.session.session import Session

_NOTEWORTHY = 1.5  # largest weight over the least, where every example was drawn equally often


def use_notes(session: Session) -> list[str]:
    """What a reader should know of the use of examples, where the formula averages the order of
    batches out: nothing if it was even."""
    run, count = session.trajectory, session.num_train
    drawn = draw_counts(run, count)
    if drawn is None:
        reason = str(run.facts.settings.get("indices", "absent")).removeprefix("absent: ")
        return [
            f"The run recorded no example indices ({reason}): every example counts as used equally "
            "often."
        ]
    least, most, never = int(drawn.min()), int(drawn.max()), int((drawn == 0).sum())
    if least < most:
        zero = f"; {never} of {count} never, so that their scores are 0" if never else ""
        return [
            f"Training drew some examples more often than others, {least} to {most} times"
            f"{zero}. Each counts by how often it was drawn."
        ]
    weights = session.example_weights((0, run.last_step))
    if weights is None or float(weights.max()) < _NOTEWORTHY * float(weights.min()):
        return []
    return [
        "Every epoch had the same batches, of unequal sizes, which gave their examples unequal "
        f"shares in the steps: {float(weights.min()):.2g} to {float(weights.max()):.2g} of an even "
        "one. Each counts by its own."
    ]
