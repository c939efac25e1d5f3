"""What ``tda evaluate`` finds of each estimator: a table to read, and the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from tda_lightning.evaluation import (
    GroundTruth,
    Interval,
    detection_auc,
    difference,
    found_within,
    group_removal,
    interval_over_subsets,
    linear_datamodeling_score,
    predicted_changes,
    slope_and_correlation,
)
from tda_lightning.evaluation.baselines import BASELINES
from tda_lightning.evaluation.lds import NothingToRankError
from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.records.scores import Scores

_WORDS = {
    "single_run": "single_run: the recorded run replayed, what is left out at weight 0",
    "algorithm": "algorithm: trained anew on the smaller training set, from fresh seeds",
    "pbrf": "pbrf: the trained model fine-tuned to give one example up while it stays near (the "
    "proximal Bregman response), which is what influence functions predict",
}
_TITLES = {"pbrf": "Rank correlation with the proximal Bregman response"}
_NAME_WIDTH = 24
LOOKED_THROUGH = 0.1  # of the training set, most suspicious first
_ELSEWHERE = 1e-2  # above rounding errors, even amplified over a long run


@dataclass(frozen=True)
class Judged:
    """One estimator before the ground truth.

    Attributes:
        name: of the scores.
        estimator: in words of their provenance.
        over_queries: the linear datamodeling score with its interval over queries; None where it
            is not defined.
        over_subsets: the same with its interval over subsets.
        seconds: that it took to make the scores; None where nothing tells.
        processor_seconds: of the process that made them, all threads together.
        reason: why there is no number.
        slope: of the measurements' changes on the predicted ones: 1 where the unit is right; None
            for scores without a unit. Under *algorithm* of their differences between subsets, see
            :func:`_slope`.
        correlation: Pearson's, of the same.
        detection: how well self-influence finds the wrong labels: the AUC, and the share found in
            the first tenth of the training set; None where no labels are known to be wrong.
    """

    name: str
    estimator: str
    over_queries: Interval | None = None
    over_subsets: Interval | None = None
    seconds: float | None = None
    reason: str | None = None
    slope: float | None = None
    detection: tuple[float, float] | None = None
    processor_seconds: float | None = None
    correlation: float | None = None

    def as_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "estimator": self.estimator}
        if self.over_queries is None or self.over_subsets is None:
            row.update(lds=None, reason=self.reason)
        else:
            undefined = int(self.over_queries.per_query.isnan().sum())
            row.update(
                lds=self.over_queries.value,
                over_queries=[self.over_queries.low, self.over_queries.high],
                over_subsets=_interval(self.over_subsets),
                undefined_queries=undefined,
                per_query=[_rounded(value) for value in self.over_queries.per_query.tolist()],
            )
        row["slope"] = self.slope
        row["correlation"] = self.correlation
        row["seconds"] = self.seconds
        row["processor_seconds"] = self.processor_seconds
        if self.detection is not None:
            row["wrong_labels"] = {
                "auc": self.detection[0],
                "found_within": {str(LOOKED_THROUGH): self.detection[1]},
            }
        return row


def judge(
    name: str,
    scores: Scores,
    truth: GroundTruth,
    wrong: torch.Tensor | None = None,
    seconds: float | None = None,
) -> Judged:
    """Compare ``scores`` with the finished retrainings of ``truth``.

    Args:
        name: of the scores.
        scores: [query, train].
        truth: of the same queries and training examples.
        wrong: which labels are known to be wrong, bool [train].
        seconds: that it took to make the scores; by default as their provenance says.

    Raises:
        TrajectoryMismatchError: they are of other queries or another training set.
    """
    truth.require_scores_of(scores.num_queries, scores.num_train)
    made = scores.provenance
    about: dict[str, Any] = {
        "name": name,
        "estimator": str(made.get("estimator", "unknown")),
        "seconds": _duration_in(made, "seconds") if seconds is None else seconds,
        "processor_seconds": _duration_in(made, "processor_seconds"),
    }
    if wrong is not None and scores.self_influence is not None:
        found = found_within(scores, wrong, LOOKED_THROUGH)
        about["detection"] = detection_auc(scores, wrong), found
    if not scores.is_complete:
        reason = (
            f"not defined: {scores.num_scored} of {scores.num_train} training examples were scored "
            "for each query, and subsets are of all"
        )
        return Judged(**about, reason=reason)
    given = (scores, truth.subsets, truth.outcomes)
    try:
        lds = linear_datamodeling_score(*given)
    except NothingToRankError as error:
        return Judged(**about, reason=f"undefined: {error}")
    if about["estimator"] not in BASELINES:
        about["slope"], about["correlation"] = _slope(scores, truth)
    return Judged(**about, over_queries=lds, over_subsets=interval_over_subsets(*given))


def _duration_in(provenance: Mapping[str, Any], name: str) -> float | None:
    """Seconds that a provenance tells; None where it has none, or something else there."""
    found = provenance.get(name)
    if not isinstance(found, (int, float)) or isinstance(found, bool):
        return None
    # Beyond any real duration: this keeps out NaN and what no float can hold.
    return float(found) if 0 <= found < 1e12 else None


def _slope(scores: Scores, truth: GroundTruth) -> tuple[float | None, float | None]:
    """Slope and correlation of the measurements' changes with the predicted ones; None for NaN.

    Under *single_run* and *pbrf* they are changes from the recorded run's end. Under *algorithm*
    they are differences from the mean over the subsets: what training on less data does to all
    subsets alike (fewer steps, above all) no scores speak of, and it is larger than what tells the
    subsets apart.
    """
    outcomes, base = truth.outcomes.mean(1), truth.baseline
    if truth.protocol == "algorithm":
        predicted = predicted_changes(scores, truth.subsets, removed=True)
        changes = (outcomes - outcomes.mean(0)).T
        found = slope_and_correlation(predicted - predicted.mean(1, keepdim=True), changes)
    else:
        removal = group_removal(scores, truth.subsets, outcomes, base)
        found = removal.slope, removal.correlation
    slope, correlation = (None if math.isnan(value) else value for value in found)
    return slope, correlation


def wrong_labels(data: Any) -> torch.Tensor | None:
    """Which training labels the data module itself made wrong, bool [train]; None for none."""
    flipped = getattr(data, "flipped", None)
    if not isinstance(flipped, torch.Tensor) or not len(flipped):
        return None
    wrong = torch.zeros(len(data.train_dataset), dtype=torch.bool)
    wrong[flipped] = True
    return wrong


def require_measurements(name: str, scores: Scores, truth: GroundTruth) -> None:
    """Refuse scores whose queries measured otherwise: of another run, task or set of queries.

    Raises:
        TrajectoryMismatchError: the provenance has measurements, and they are others.
    """
    told = scores.provenance.get("measurements")
    if not isinstance(told, list) or len(told) != len(truth.baseline):
        return
    if not all(isinstance(value, (int, float)) for value in told):
        return
    found = torch.tensor(told, dtype=torch.float64)
    if not torch.allclose(found, truth.baseline, rtol=1e-2, atol=1e-3):
        query = int((found - truth.baseline).abs().argmax())
        raise TrajectoryMismatchError(
            f"The scores {name} are of another run, task or set of queries: query {query} "
            f"measured {float(found[query]):.6g} there and {float(truth.baseline[query]):.6g} "
            "here. Give scores of this run."
        )


def seed_share(truth: GroundTruth) -> float | None:
    """Share of the measurements' variance that is between seeds of one subset, averaged over the
    queries; None with one seed."""
    if truth.seeds.shape[1] < 2:
        return None
    within = truth.outcomes.var(1).mean(0)
    # Means over seeds vary by what is left of the seeds, too.
    between = (truth.outcomes.mean(1).var(0) - within / truth.seeds.shape[1]).clamp_min(0)
    known = within + between > 0
    share = within[known] / (within + between)[known]
    return float(share.mean()) if len(share) else None


def judged_table(rows: Sequence[Judged], protocol: str = "single_run") -> Table:
    """The linear datamodeling scores with both intervals."""
    table = Table(title=_TITLES.get(protocol, "Linear datamodeling score"))
    names_column(table, [row.name for row in rows])
    table.add_column("rank" if protocol in _TITLES else "LDS", justify="right")
    table.add_column("95% over queries")
    table.add_column("95% over subsets")
    table.add_column("slope", justify="right", no_wrap=True)
    detected = any(row.detection is not None for row in rows)
    if detected:
        table.add_column("wrong labels")
    table.add_column("made in", justify="right", no_wrap=True)
    for row in rows:
        if row.over_queries is None or row.over_subsets is None:
            cells = ["none", "", "", ""]
        else:
            lds, other = row.over_queries, row.over_subsets
            cells = [
                f"{lds.value:.3f}",
                f"{lds.low:.3f} to {lds.high:.3f}",
                "unknown" if math.isnan(other.low) else f"{other.low:.3f} to {other.high:.3f}",
                "" if row.slope is None else f"{row.slope:.3g}",
            ]
        if detected:
            auc, share = row.detection or (math.nan, math.nan)
            cells.append("" if row.detection is None else f"AUC {auc:.3f}, {share:.0%}")
        taken = "" if row.seconds is None else _duration(row.seconds)
        table.add_row(row.name, *cells, taken)
    return table


def names_column(table: Table, names: Sequence[str]) -> None:
    """A column of names, of which long ones are folded before numbers beside them are."""
    width = min(_NAME_WIDTH, max(map(len, names), default=0))
    table.add_column("scores", overflow="fold", min_width=width, max_width=_NAME_WIDTH)


def how_judged(rows: Sequence[Judged], truth: GroundTruth, seconds: float) -> str:
    """What the numbers are about, in plain words."""
    subsets, seeds = truth.seeds.shape
    lines = [
        f"Protocol {_WORDS[truth.protocol]}.",
        f"{subsets} subsets of {int(truth.subsets[0].sum())} of {truth.subsets.shape[1]} training "
        "examples, "
        f"{seeds} seed{'s' * (seeds > 1)} each, {len(truth.baseline)} queries; "
        f"{_duration(float(truth.seconds.sum()))} of retraining in all, {_duration(seconds)} now.",
    ]
    lines += [f"No number for {row.name}, {row.reason}" for row in rows if row.reason is not None]
    if any(row.slope is not None for row in rows):
        what = "differences between subsets" if truth.protocol == "algorithm" else "changes"
        lines.append(
            f"Slope: of the measurements' {what} on the predicted ones; 1 is the right unit."
        )
    if any(row.seconds is not None for row in rows):
        lines.append(
            "Made in: so long the attribution took, taking up curvature that earlier ones had kept."
        )
    undefined = {
        int(row.over_queries.per_query.isnan().sum())
        for row in rows
        if row.over_queries is not None
    }
    if undefined - {0}:
        lines.append(
            f"{max(undefined)} queries measured the same after every retraining: their correlation "
            "is undefined and left out of the means."
        )
    if any(row.detection is not None for row in rows):
        lines.append(
            "Wrong labels are those that the data module flipped, found by self-influence: the AUC "
            f"and the share of them among the first {LOOKED_THROUGH:.0%} of the training set."
        )
    if (share := seed_share(truth)) is not None:
        lines.append(
            f"{share:.0%} of the measurements' variance is between seeds of one subset: no scores "
            "can explain that part, and more seeds average it away."
        )
    error = truth.made_by.get("landing_error")
    if isinstance(error, (int, float)) and error > _ELSEWHERE:
        lines.append(
            f"A replay with all weights 1 misses the recorded end by {error:.1e} of the way: the "
            "retrainings are of another run close to the recorded one. See tda check."
        )
    return "\n".join(lines)


def judged_json(
    rows: Sequence[Judged], truth: GroundTruth, seconds: float, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything the table says, and more: the score of every query, and how far each row is from
    the best one, query by query."""
    best = _best(rows)
    subsets, seeds = truth.seeds.shape
    return {
        **about,
        "protocol": truth.protocol,
        "num_subsets": subsets,
        "alpha": truth.fraction,
        "num_seeds": seeds,
        "num_queries": len(truth.baseline),
        "num_train": truth.subsets.shape[1],
        "landing_error": truth.made_by.get("landing_error"),
        "seed_variance_share": seed_share(truth),
        "retraining_seconds": float(truth.seconds.sum()),
        "seconds": seconds,
        "configuration": dict(truth.configuration),
        "best": None if best is None else best.name,
        "rows": [{**row.as_json(), **_from_best(row, best)} for row in rows],
    }


def _best(rows: Sequence[Judged]) -> Judged | None:
    known = [row for row in rows if row.over_queries is not None]
    return max(known, key=lambda row: row.over_queries.value, default=None)  # type: ignore[union-attr]


def _from_best(row: Judged, best: Judged | None) -> dict[str, Any]:
    """The row's score minus the best one's, with its interval over queries."""
    if best is None or best.over_queries is None or row.over_queries is None:
        return {}
    found = difference(row.over_queries, best.over_queries)
    return {"from_best": {"value": found.value, "over_queries": [found.low, found.high]}}


def _rounded(value: float) -> float | None:
    """Six digits say all that a rank correlation of few subsets can; None for NaN."""
    return None if math.isnan(value) else round(value, 6)


def _interval(found: Interval) -> list[float | None]:
    return [None if math.isnan(end) else end for end in (found.low, found.high)]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
