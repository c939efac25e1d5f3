"""The question that scores answer (``keep``), and the one that is asked of them (``alpha``)."""

from __future__ import annotations

from collections.abc import Mapping

from tda_lightning.records.provenance import well_formed
from tda_lightning.records.scores import Scores

_USUAL_ALPHA = 0.5
# Shares of the training data closer than this ask the same: 1 is the question about few examples.
_CLOSE = 0.05


def keep_of(scores: Scores) -> float:
    """The mean weight of the training examples where the derivative was taken; 1 in the recorded
    run."""
    return well_formed(scores.provenance).get("what_if", {}).get("keep", 1.0)


def alpha_of(scores: Mapping[str, Scores]) -> float:
    """The share to keep where none is asked for: that of the scores, if they all have the same one
    below 1."""
    keeps = {keep_of(judged) for judged in scores.values()}
    (keep,) = keeps if len(keeps) == 1 else [1.0]
    return keep if keep < 1 else _USUAL_ALPHA


def keep_notes(keeps: Mapping[str, float], kept: float, trajectory: object) -> list[str]:
    """Which scores, by name and ``keep``, answer another question than subsets that keep the share
    ``kept``, and which command answers this one.

    Example:
        >>> keep_notes({"tracin": 1.0}, 0.95, "runs/digits")
        []
    """
    other: dict[float, list[str]] = {}
    for name, keep in keeps.items():
        if abs(keep - kept) > _CLOSE + 1e-9:
            other.setdefault(keep, []).append(name)
    if not other:
        return []
    names = " and ".join(f"{keep:.0%} ({', '.join(own)})" for keep, own in other.items())
    matching = 1 if kept > 1 - _CLOSE else round(kept, 4)
    return [
        f"Judged where {kept:.0%} of the data are kept, with derivatives taken where {names} are. "
        f"Scores for this question: tda attribute {trajectory} keep={matching:g}"
    ]
