"""Scores against what the measurement did over the run: sizes that cannot be are said to be so."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tda_lightning.records.provenance import Provenance
from tda_lightning.session.session import Session

UNITLESS = "no unit"  # how the sizes of scores begin that are in no unit of the measurement
_CHECKPOINTS = 6  # at which queries are measured
# Ranges of the measurement that the size of a score may take, where sizes are predicted and where
# they are not: those of damped influence functions are 10 to 100 times too large as a rule.
_BEYOND, _BEYOND_OF_RANKS = 2.0, 100.0
_SCALARS = 1 << 24  # looked at together


def earlier_measurements(session: Session) -> list[float]:
    """Measurements of all queries at the initial weights and at those checkpoints before the last
    that the estimator had loaded."""
    loaded = set(session.loaded_checkpoints)
    steps = sorted((loaded | {0}) & set(session.trajectory.checkpoints))
    spaced = {round(n * (len(steps) - 1) / (_CHECKPOINTS - 1)) for n in range(_CHECKPOINTS)}
    values: list[float] = []
    with torch.no_grad():
        for step in [steps[place] for place in sorted(spaced)]:
            if step == session.trajectory.last_step:
                continue
            session.load(step)
            for batch, indices in session.whole_queries():
                values += session.measurement(session.module, batch, indices).tolist()
            if step not in loaded:
                session.forget(step)
    return values


def measured_range(values: Sequence[float]) -> Provenance:
    """The least and the largest of some measurements."""
    known = [value for value in values if math.isfinite(value)]
    return {"measured_range": [min(known), max(known)]} if known else {}


def beyond_range(parts: Sequence[Tensor], made: Provenance) -> Provenance:
    """Scores far beyond the range of the measurement, with a note; nothing where there are none.

    Args:
        parts: [query, train] each; their sum is the scores.
    """
    least, most = made.get("measured_range", (0.0, 0.0))
    if made.get("sizes", "").startswith(UNITLESS):
        return {}
    ranks = made.get("sizes", "").startswith("ranks")
    times = _BEYOND_OF_RANKS if ranks else _BEYOND
    limit = times * (most - least)
    if not limit > 0 or not math.isfinite(limit):
        return {}
    largest, count = 0.0, 0
    together = max(1, _SCALARS // max(1, parts[0].shape[1]))
    for rows in zip(*(part.split(together) for part in parts), strict=True):
        sizes = torch.stack(rows).sum(0).abs().nan_to_num(nan=0.0)  # without a score
        largest, count = max(largest, float(sizes.max())), count + int((sizes > limit).sum())
    if not count:
        return {}
    note = (
        f"These scores cannot be right in size: the largest is {largest:.3g}, while the "
        f"measurement ranged from {least:.3g} to {most:.3g} over all queries and the checkpoints "
        f"looked at. {count} of {parts[0].numel()} scores exceed {times:g} times that range, "
        "and one example does not do more than the whole training. Ask `tda check` whether "
        "derivatives of this run predict anything, and compare with another estimator."
    )
    return {"beyond_range": {"largest": largest, "count": count}, "notes": [note]}
