"""What ``tda evaluate`` finds out about each file of scores, as a table, in words and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from tda_lightning.cli.evaluation_limits import Limits
from tda_lightning.cli.matched_keep import keep_of
from tda_lightning.evaluation import (
    BASELINES,
    GroundTruth,
    Interval,
    NothingToRankError,
    detection_auc,
    difference,
    found_within,
    group_removal,
    interval_over_subsets,
    linear_datamodeling_score,
    predicted_changes,
    slope_and_correlation,
)
from tda_lightning.evaluation.retraining import ROUNDING
from tda_lightning.records.data_module import AttributedData
from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.records.provenance import well_formed
from tda_lightning.records.scores import Scores
from tda_lightning.runtime.formatting import readable_time

_PROTOCOLS = {
    "single_run": "the recorded run replayed, with what is left out at weight 0",
    "algorithm": "trained from scratch on the smaller training set, with fresh seeds",
    "pbrf": "the trained model fine-tuned to give up one example while staying close (the proximal "
    "Bregman response), which is what influence functions predict",
}
_NAME_WIDTH = 24
INSPECTED = 0.1  # share of the training set, most suspicious first


@dataclass(frozen=True)
class JudgedScores:
    """Scores compared with the ground truth.

    Attributes:
        name: of the scores.
        estimator: according to their provenance.
        over_queries: linear datamodeling score with its interval over queries; None if undefined.
        over_subsets: the same with its interval over subsets.
        reason: why it is undefined.
        slope: slope of the measured changes on the predicted ones, 1 where the unit is right; None
            for scores without a unit. Under *algorithm* of differences between subsets, see
            :func:`_slope_and_correlation`.
        correlation: Pearson correlation of the same.
        detection: how well self-influence finds the wrong labels: the AUC, and the share found in
            the first tenth of the training set; None where no labels are known to be wrong.
        seconds: time that making the scores took; None if unknown.
        processor_seconds: processor time of it, all threads together.
        keep: share of the data that stays in the question they answer; None for baselines.
        beyond: how many scores cannot be right in size (``records.provenance.BeyondRange``).
    """

    name: str
    estimator: str
    over_queries: Interval | None = None
    over_subsets: Interval | None = None
    reason: str | None = None
    slope: float | None = None
    correlation: float | None = None
    detection: tuple[float, float] | None = None
    seconds: float | None = None
    processor_seconds: float | None = None
    keep: float | None = None
    beyond: int = 0

    def as_json(self) -> dict[str, object]:
        """All of it, with the score of every query."""
        row: dict[str, object] = {"name": self.name, "estimator": self.estimator}
        if self.over_queries is None or self.over_subsets is None:
            row.update(lds=None, reason=self.reason)
        else:
            per_query = self.over_queries.per_query
            subsets = self.over_subsets
            row.update(
                lds=self.over_queries.value,
                over_queries=[self.over_queries.low, self.over_queries.high],
                over_subsets=[_none_if_nan(end) for end in (subsets.low, subsets.high)],
                undefined_queries=int(per_query.isnan().sum()),
                # Six digits are plenty for a rank correlation over few subsets.
                per_query=[_none_if_nan(round(value, 6)) for value in per_query.tolist()],
            )
        row["keep"] = self.keep
        row["slope"] = self.slope
        row["correlation"] = self.correlation
        row["seconds"] = self.seconds
        row["processor_seconds"] = self.processor_seconds
        if self.detection is not None:
            row["wrong_labels"] = {
                "auc": self.detection[0],
                "found_within": {str(INSPECTED): self.detection[1]},
            }
        return row


def judge(
    name: str,
    scores: Scores,
    truth: GroundTruth,
    wrong: torch.Tensor | None = None,
    seconds: float | None = None,
) -> JudgedScores:
    """Compare ``scores`` with the retrainings of ``truth``.

    Args:
        name: of the scores.
        scores: [query, train].
        truth: retrainings of the same queries and training examples.
        wrong: which labels are known to be wrong, bool [train].
        seconds: time that making the scores took; by default from their provenance.

    Raises:
        TrajectoryMismatchError: they are of other queries or another training set.
    """
    truth.require_scores_of(scores.num_queries, scores.num_train)
    provenance = well_formed(scores.provenance)
    row: dict[str, Any] = {
        "name": name,
        "estimator": provenance.get("estimator", "unknown"),
        "seconds": provenance.get("seconds") if seconds is None else seconds,
        "processor_seconds": provenance.get("processor_seconds"),
        "beyond": provenance.get("beyond_range", {"count": 0})["count"],
    }
    row["keep"] = None if row["estimator"] in BASELINES else keep_of(scores)
    if wrong is not None and scores.self_influence is not None:
        row["detection"] = detection_auc(scores, wrong), found_within(scores, wrong, INSPECTED)
    if not scores.is_complete:
        reason = (
            f"not defined: {scores.num_scored} of {scores.num_train} training examples were scored "
            "for each query, and subsets contain all of them"
        )
        return JudgedScores(**row, reason=reason)
    compared = (scores, truth.subsets, truth.outcomes)
    try:
        lds = linear_datamodeling_score(*compared)
    except NothingToRankError as error:
        return JudgedScores(**row, reason=f"undefined: {error}")
    if row["keep"] is not None:
        row["slope"], row["correlation"] = map(_none_if_nan, _slope_and_correlation(scores, truth))
    return JudgedScores(**row, over_queries=lds, over_subsets=interval_over_subsets(*compared))


def _slope_and_correlation(scores: Scores, truth: GroundTruth) -> tuple[float, float]:
    """Of the measured changes with the predicted ones.

    Under *single_run* and *pbrf* these are changes from the end of the recorded run. Under
    *algorithm* they are differences from the mean over the subsets: training on less data affects
    all subsets alike (above all by fewer steps), by more than they differ, and scores do not
    predict that.
    """
    outcomes = truth.outcomes.mean(1)
    if truth.protocol == "algorithm":
        predicted = predicted_changes(scores, truth.subsets, removed=True)
        changes = (outcomes - outcomes.mean(0)).T
        return slope_and_correlation(predicted - predicted.mean(1, keepdim=True), changes)
    removal = group_removal(scores, truth.subsets, outcomes, truth.baseline)
    return removal.slope, removal.correlation


def wrong_labels(data: AttributedData) -> torch.Tensor | None:
    """The training labels that the data module itself flipped, bool [train]; None if none."""
    flipped = getattr(data, "flipped", None)
    if not isinstance(flipped, torch.Tensor) or not len(flipped):
        return None
    wrong = torch.zeros(len(data.train_dataset), dtype=torch.bool)
    wrong[flipped] = True
    return wrong


def require_measurements(name: str, scores: Scores, truth: GroundTruth) -> None:
    """Refuse scores whose queries had other measurements: of another run, task or set of queries.

    Raises:
        TrajectoryMismatchError: the measurements in the provenance are others.
    """
    provenance = well_formed(scores.provenance)
    measurements = provenance.get("measurements")
    if "ensemble" in provenance:
        if provenance["ensemble"] in ("dropout", "lora"):
            return  # of other models than the run's own
        measurements = provenance["members"][0].get("measurements")
    if measurements is None or len(measurements) != len(truth.baseline):
        return
    measured = torch.tensor(measurements, dtype=torch.float64)
    if not torch.allclose(measured, truth.baseline, rtol=1e-2, atol=1e-3):
        query = int((measured - truth.baseline).abs().argmax())
        raise TrajectoryMismatchError(
            f"The scores {name} are of another run, task or set of queries: query {query} "
            f"measured {float(measured[query]):.6g} there and {float(truth.baseline[query]):.6g} "
            "here. Give scores of this run."
        )


def seed_variance_share(truth: GroundTruth) -> float | None:
    """Share of the measurements' variance that lies between seeds of one subset, averaged over
    queries; None with one seed."""
    if truth.seeds.shape[1] < 2:
        return None
    within = truth.outcomes.var(1).mean(0)
    # The seeds' variance is still in the means over seeds, reduced by their number.
    between = (truth.outcomes.mean(1).var(0) - within / truth.seeds.shape[1]).clamp_min(0)
    known = within + between > 0
    share = within[known] / (within + between)[known]
    return float(share.mean()) if len(share) else None


def evaluation_table(
    rows: Sequence[JudgedScores], protocol: str = "single_run", limits: Limits | None = None
) -> Table:
    """The linear datamodeling scores with both intervals, and what there is to reach."""
    limits = limits or Limits()
    responses = protocol == "pbrf"
    title = "Rank correlation with the proximal Bregman response"
    table = Table(title=title if responses else "Linear datamodeling score")
    names = [f"{row.name} (!)" if row.beyond else row.name for row in rows]
    words = [word for name, _ in limits.rows() for word in name.split()]
    add_names_column(table, [*names, *words])
    asked = any(row.keep not in (None, 1) for row in rows)
    if asked:
        table.add_column("keep", justify="right", no_wrap=True)
    # A narrow terminal folds the intervals, and cuts no number off.
    table.add_column("rank" if responses else "LDS", justify="right", no_wrap=True)
    table.add_column("95% over queries")
    table.add_column("95% over subsets")
    if limits.seeds is not None:
        table.add_column("of\nlimit", justify="right", no_wrap=True)
    table.add_column("slope", justify="right", no_wrap=True)
    times = ["" if row.seconds is None else readable_time(row.seconds) for row in rows]
    table.add_column("time", justify="right", no_wrap=True)
    for name, row, taken in zip(names, rows, times, strict=True):
        cells = ["none", "", ""]
        share = slope = ""
        if row.over_queries is not None and row.over_subsets is not None:
            cells = _cells(row.over_queries, row.over_subsets)
            share = limits.share(row.over_queries.value)
            slope = "" if row.slope is None else f"{row.slope:.3g}"
        if asked:
            cells.insert(0, "" if row.keep is None else f"{row.keep:g}")
        if limits.seeds is not None:
            cells.append(share)
        table.add_row(name, *cells, slope, taken)
    if limits.rows():
        table.add_section()
    for name, limit in limits.rows():
        own = _cells(limit.over_queries, limit.over_subsets)
        table.add_row(name, *[""] * asked, *own)
    return table


def detection_table(rows: Sequence[JudgedScores]) -> Table | None:
    """How well self-influence finds the wrong labels; None where no labels are known to be."""
    known = [(row.name, *row.detection) for row in rows if row.detection is not None]
    if not known:
        return None
    table = Table(title="Wrong labels by self-influence")
    add_names_column(table, [name for name, _, _ in known])
    table.add_column("AUC", justify="right")
    table.add_column(f"found in the first {INSPECTED:.0%}", justify="right")
    for name, auc, found in known:
        table.add_row(name, f"{auc:.3f}", f"{found:.0%}")
    return table


def _cells(queries: Interval, subsets: Interval) -> list[str]:
    """A linear datamodeling score and its intervals."""
    unknown = math.isnan(subsets.low)
    return [
        f"{queries.value:.3f}",
        f"{queries.low:.3f} to {queries.high:.3f}",
        "unknown" if unknown else f"{subsets.low:.3f} to {subsets.high:.3f}",
    ]


def add_names_column(table: Table, names: Sequence[str]) -> None:
    """A column of names; long ones are folded before the numbers beside them are."""
    width = min(_NAME_WIDTH, max(map(len, names), default=0))
    table.add_column("scores", overflow="fold", width=max(width, len("scores")))


def evaluation_notes(
    rows: Sequence[JudgedScores], truth: GroundTruth, seconds: float, limits: Limits | None = None
) -> str:
    """What the numbers in the table mean, in words."""
    subsets, seeds = truth.seeds.shape
    lines = [
        f"Protocol {truth.protocol}: {_PROTOCOLS[truth.protocol]}.",
        f"{subsets} subsets of {int(truth.subsets[0].sum())} of {truth.subsets.shape[1]} training "
        f"examples, {seeds} seed{'s' * (seeds > 1)} each, {len(truth.baseline)} queries; "
        f"{readable_time(float(truth.seconds.sum()))} of retraining in total, "
        f"{readable_time(seconds)} now.",
    ]
    lines += [f"No number for {row.name}, {row.reason}" for row in rows if row.reason is not None]
    lines += [
        f"(!) {row.beyond} scores of {row.name} cannot be right in size: they are far beyond "
        "the range that the measurement had over the run."
        for row in rows
        if row.beyond
    ]
    if any(row.keep not in (None, 1) for row in rows):
        lines.append(
            "Keep: the share of the data that would stay, in the question that scores answer."
        )
    if any(row.slope is not None for row in rows):
        what = "differences between subsets" if truth.protocol == "algorithm" else "changes"
        lines.append(f"Slope: measured {what} on predicted ones; 1 means that the unit is right.")
    if any(row.seconds is not None for row in rows):
        lines.append("Time: how long the attribution took, with what was cached by then.")
    undefined = [int(row.over_queries.per_query.isnan().sum()) for row in rows if row.over_queries]
    if any(undefined):
        lines.append(
            f"{max(undefined)} queries measured the same after every retraining: their correlation "
            "is undefined and left out of the means."
        )
    if any(row.detection is not None for row in rows):
        lines.append(
            "Wrong labels: those that the data module flipped; the area under the ROC curve, and "
            f"the share of them in the first {INSPECTED:.0%} of the training set."
        )
    if (share := seed_variance_share(truth)) is not None:
        lines.append(
            f"{share:.0%} of the measurements' variance is between seeds of one subset: no scores "
            "can explain that part, and more seeds average it out."
        )
    lines += [] if limits is None else limits.notes
    error = truth.made_by.get("landing_error")
    if isinstance(error, (int, float)) and error > ROUNDING:
        lines.append(
            f"A replay with all weights 1 misses the recorded end by {error:.1e} of the way: the "
            "retrainings are of another run, close to the recorded one. See tda check."
        )
    return "\n".join(lines)


def evaluation_json(
    rows: Sequence[JudgedScores],
    truth: GroundTruth,
    seconds: float,
    header: Mapping[str, object],
    limits: Limits | None = None,
) -> dict[str, object]:
    """Everything in the table, and more: the score of every query, and how far each row is from
    the best one, query by query."""
    defined = [row for row in rows if row.over_queries is not None]
    best = max(defined, key=lambda row: row.over_queries.value, default=None)  # type: ignore[union-attr]
    subsets, seeds = truth.seeds.shape
    return {
        **header,
        "protocol": truth.protocol,
        "num_subsets": subsets,
        "alpha": truth.fraction,
        "num_seeds": seeds,
        "num_queries": len(truth.baseline),
        "num_train": truth.subsets.shape[1],
        "landing_error": truth.made_by.get("landing_error"),
        "seed_variance_share": seed_variance_share(truth),
        "limits": (limits or Limits()).as_json(),
        "retraining_seconds": float(truth.seconds.sum()),
        "seconds": seconds,
        "configuration": dict(truth.configuration),
        "best": None if best is None else best.name,
        "rows": [{**row.as_json(), **_from_best(row, best)} for row in rows],
    }


def _from_best(row: JudgedScores, best: JudgedScores | None) -> dict[str, object]:
    """The row's score minus the best one's, with its interval over queries."""
    if best is None or best.over_queries is None or row.over_queries is None:
        return {}
    gap = difference(row.over_queries, best.over_queries)
    return {"from_best": {"value": gap.value, "over_queries": [gap.low, gap.high]}}


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
