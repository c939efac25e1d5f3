"""Which queries come first: the wrong ones, then the worst."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tda_lightning.records.provenance import Provenance
from tda_lightning.records.scores import Scores
from tda_lightning.report.columns import Column
from tda_lightning.report.kept import shorten


@dataclass(frozen=True)
class Judged:
    """What is known of the queries, one entry each; empty where it is unknown.

    Attributes:
        predictions: in words.
        measurements: of the final model.
        wrong: whether the prediction names another class than the label; None where neither is
            known to be.
    """

    predictions: list[str]
    measurements: list[float]
    wrong: list[bool | None]

    def order(self, count: int) -> list[int]:
        """The rows of the scores, wrong predictions first, then larger measurements first."""
        wrong = [state is True for state in self.wrong] or [False] * count
        worst = self.measurements or [0.0] * count
        return sorted(range(count), key=lambda row: (not wrong[row], -worst[row], row))


def judge(
    scores: Scores,
    provenance: Provenance,
    label: Column | None,
    predictions: Sequence[str] | None,
) -> Judged:
    """Measurements and predictions of the queries, and which predictions are wrong."""
    count = scores.num_queries
    given = predictions or provenance.get("predictions", [])
    given = given if len(given) == count else []
    measurements = provenance.get("measurements", [])
    return Judged(
        [shorten(str(text), 200) for text in given],
        measurements if len(measurements) == count else [],
        _wrong(given, label),
    )


def _wrong(predictions: Sequence[str], label: Column | None) -> list[bool | None]:
    """A prediction is wrong if it is the name of a class, and not of the query's own."""
    if label is None or label.query is None or not predictions:
        return []
    names = set(label.groups)
    wrong: list[bool | None] = []
    for text, number in zip(predictions, label.query.tolist(), strict=True):
        # "dog (88%)" is how predictions are described with their probability.
        named = re.sub(r"\s*\([^()]*\)\s*$", "", str(text)).strip()
        named = named if named in names or f"label {named}" not in names else f"label {named}"
        wrong.append(named != label.groups[number] if named in names else None)
    return wrong if any(state is not None for state in wrong) else []


def relative_spread(scores: Scores) -> list[float]:
    r"""How much the runs of an ensemble differ about each query: :math:`\|s\| / \|m\|` over the
    training examples, with m their mean scores and s the standard errors. Empty for a single run.
    """
    if scores.members is None:
        return []
    shares = []
    for query in range(scores.num_queries):  # the file may be larger than memory
        members = torch.nan_to_num(scores.members[:, query].double())
        error = members.std(0).norm() / len(members) ** 0.5
        mean = members.mean(0).norm()
        shares.append(float(error / mean) if mean > 0 else 0.0)
    return shares
