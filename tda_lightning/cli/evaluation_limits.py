"""What a linear datamodeling score can be at most, beside those that ``tda evaluate`` measures."""

from __future__ import annotations

from dataclasses import dataclass, field

from tda_lightning.evaluation import (
    Ceiling,
    GroundTruth,
    NothingToRankError,
    additive_ceiling,
    fitted_linear_model,
    seed_ceiling,
)

# An estimate is shown if its interval over subsets is narrower than this.
_INFORMATIVE = 0.5


@dataclass(frozen=True)
class Limits:
    """What there is to reach.

    Attributes:
        seeds: for a predictor that knows the mean over all seeds; None where that is not known.
        additive: for the best additive scores; None where that is not known.
        fitted: by a linear model fitted to the other retrainings; None where these are too few.
        notes: what the numbers are, or why there are none, in words.
    """

    seeds: Ceiling | None = None
    additive: Ceiling | None = None
    fitted: Ceiling | None = None
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, Ceiling]]:
        """Those that are known, with their names in the table."""
        named = {
            "limit: seeds": self.seeds,
            "limit: additive": self.additive,
            "linear fit": self.fitted,
        }
        return [(name, limit) for name, limit in named.items() if limit is not None]

    def share(self, value: float) -> str:
        """The share of the limit by seeds that a score reaches, where that limit is above 0."""
        if self.seeds is None or not self.seeds.over_subsets.low > 0:
            return ""
        return f"{value / self.seeds.over_subsets.value:.0%}"

    def as_json(self) -> dict[str, object]:
        """The limits with their intervals, by name; None for those that are not known."""
        named = {"seeds": self.seeds, "additive": self.additive, "fitted": self.fitted}
        return {
            name: None
            if limit is None
            else {
                "lds": limit.over_queries.value,
                "over_queries": [limit.over_queries.low, limit.over_queries.high],
                "over_subsets": [limit.over_subsets.low, limit.over_subsets.high],
            }
            for name, limit in named.items()
        }


def evaluation_limits(truth: GroundTruth) -> Limits:
    """All that these retrainings tell about what can be reached."""
    subsets, seeds = truth.seeds.shape
    train = truth.subsets.shape[1]
    if train - int(truth.subsets[0].sum()) < 2:
        return Limits()  # one example at a time: every measurement is additive
    notes = []
    by_seeds = additive = fitted = None
    try:
        if truth.protocol == "algorithm" and seeds > 1 and subsets > 3:
            by_seeds = seed_ceiling(truth.outcomes)
            notes.append(
                "Limit, seeds: what a predictor would reach that knows the mean over all seeds. "
                f"No scores get further with {seeds} seeds per subset, up to the intervals."
            )
        elif truth.protocol == "algorithm" and seeds > 1:
            notes.append(
                "How much of the rest is noise between seeds, which no scores predict, is not told "
                f"by {subsets} subsets: more than three tell, and keep the retrainings that are "
                "there."
            )
        elif truth.protocol == "algorithm":
            notes.append(
                "How much of the rest is noise between seeds, which no scores predict, is not told "
                "by one seed per subset: seeds=2 tells, and keeps the retrainings that are there."
            )
        estimate = additive_ceiling(truth.subsets, truth.outcomes)
        if estimate is not None:
            over = estimate.over_subsets
            if over.high - over.low < _INFORMATIVE:
                additive = estimate
                notes.append(
                    "Limit, additive: estimated for the best linear model of which examples are "
                    "kept. Scores are added up, so none get further, up to the intervals."
                )
            else:
                notes.append(
                    f"What additive scores can reach is not told by {subsets} subsets of {train} "
                    f"examples (between {over.low:.2f} and {over.high:.2f}): more subsets tell, "
                    "and keep the retrainings that are there."
                )
        fitted = fitted_linear_model(truth.subsets, truth.outcomes)
        if fitted is not None:
            notes.append(
                "Linear fit: what a linear model reaches that was fitted to nine tenths of the "
                "retrainings and predicts the others. Additive scores can reach at least that."
            )
    except NothingToRankError:
        return Limits()
    return Limits(by_seeds, additive, fitted, notes)
