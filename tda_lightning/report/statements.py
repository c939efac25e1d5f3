"""What the provenance says about the question that scores answer, and how exactly, in sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tda_lightning.records.provenance import (
    Certificate,
    DampingSensitivity,
    EditRecord,
    PoolRecord,
    Provenance,
    SolverRecord,
    SpotCheck,
)
from tda_lightning.records.scores import Scores
from tda_lightning.report.charts import number
from tda_lightning.report.kept import shorten
from tda_lightning.report.provenance_rows import one_line

_LISTED = 12  # names in a sentence; of more, their number is given
_PROTOCOLS = {
    "single_run": "the recorded run replayed, with what is left out at weight 0",
    "algorithm": "trained from scratch on the smaller training set, with fresh seeds",
}


@dataclass(frozen=True)
class Statement:
    """A sentence under a heading; ``kind`` is a class of the style sheet: good, fair or nothing."""

    heading: str
    text: str
    kind: str = ""


def statements(scores: Scores, provenance: Provenance) -> list[Statement]:
    """The question, which examples were scored, the certificate of a replay, solvers, and what a
    spot check (``tda evaluate spot_check=true``) found.

    Args:
        scores: what the page shows.
        provenance: the part of their provenance that has the agreed form.
    """
    trust = provenance.get("trust", {})
    parts = (
        _candidates(scores, provenance),
        _question(provenance.get("question", "")),
        _beyond_range(provenance),
        _sizes(provenance.get("sizes", "")),
        _certificate(provenance.get("certificate"), provenance),
        _truncation(provenance.get("replayed_steps")),
        _asked(provenance),
        _pool(provenance.get("pool")),
        _edits([] if "pool" in provenance else provenance.get("edits", [])),
        _other_labels(relabelled(provenance)),
        _solver(provenance.get("solver")),
        _spot_check(trust.get("spot_check")),
        _responses(trust.get("pbrf")),
        _damping(trust.get("damping")),
        _agreement(trust.get("agreement", {})),
        _seeds(trust.get("seed_variance_share")),
    )
    return [part for part in parts if part is not None]


def relabelled(provenance: Provenance) -> dict[str, str]:
    """The other labels that scores are about, by column."""
    edits = enumerate(provenance.get("edits", []))
    labels = {str(column): edit["label"] for column, edit in edits if "label" in edit}
    labels |= provenance.get("relabel", {})
    return {index: shorten(one_line(label), 40) for index, label in labels.items()}


def _edits(edits: list[EditRecord]) -> Statement | None:
    if not edits:
        return None
    named = _listed([f"{column}, {edit_in_words(edit)}" for column, edit in enumerate(edits)], "; ")
    return Statement(
        "Edits",
        "The scores are about these edits of the training set, by their numbers, in place of the "
        f"removal of each example: {named}.",
    )


def _asked(provenance: Provenance) -> Statement | None:
    asked = provenance.get("measurement")
    if asked is None:
        return None
    text = f"The scores are about {shorten(asked['quantity'], 200)}."
    if asked["sign"] < 0:
        text += (
            " The measurement is minus it: without a proponent it would be smaller by the score."
        )
    return Statement("Measurement", text)


def _pool(pool: PoolRecord | None) -> Statement | None:
    if pool is None:
        return None
    text = f"The columns are {pool['size']:,} examples, as if each were added to the training set."
    if not pool["in_training"]:
        return Statement("Pool", f"{text} None of them is in it.")
    text += f" {pool['in_training']:,} are in it already: their scores are about one more of them."
    return Statement("Pool", text, "fair")


def edit_in_words(edit: EditRecord) -> str:
    """An edit in a few words."""
    where = f" of example {edit['index']}" if "index" in edit else ""
    label = f" as {shorten(one_line(edit['label']), 40)}" if "label" in edit else ""
    return f"{shorten(edit['kind'], 40).lower()}{where}{label}"


def _candidates(scores: Scores, provenance: Provenance) -> Statement | None:
    if scores.is_complete:
        return None
    candidates = provenance.get("candidates", {})
    features, metric = candidates.get("features"), candidates.get("metric")
    compared = f" by the {shorten(features, 60)}" if features else ""
    compared += f" ({shorten(metric, 60)})" if metric else ""
    return Statement(
        "Candidates",
        f"Only the {scores.num_scored:,} of {scores.num_train:,} training examples nearest to "
        f"each query{compared} were scored. The others have no score, and a stronger proponent or "
        "opponent may be among them.",
        "fair",
    )


def _question(question: str) -> Statement | None:
    if not question:
        return None
    return Statement("Question", f"{question[:1].upper()}{shorten(question[1:], 400)}.")


def _sizes(sizes: str) -> Statement | None:
    if not sizes:
        return None
    return Statement("Sizes of scores", f"{sizes[:1].upper()}{shorten(sizes[1:], 400)}.")


def _beyond_range(provenance: Provenance) -> Statement | None:
    beyond = provenance.get("beyond_range")
    if beyond is None:
        return None
    least, most = provenance.get("measured_range", [math.nan, math.nan])
    return Statement(
        "Impossible sizes",
        f"{beyond['count']:,} scores, up to {number(beyond['largest'])} in size, are far "
        f"beyond the range of the measurement over the run ({number(least)} to {number(most)}). "
        "One example does not do more than the whole training: these numbers cannot be right in "
        "size, and their ranking may be wrong too.",
        "fair",
    )


def _certificate(certificate: Certificate | None, provenance: Provenance) -> Statement | None:
    if certificate is None:
        return None
    count = certificate["checkpoints"]
    # The first recorded checkpoint is the start of the run.
    every = count == len(provenance.get("checkpoints", [])) - 1
    which = f"{'all' if every else 'the'} {count} recorded checkpoints"
    if count == 1:
        which = "the recorded checkpoint"
    which += "" if every else " that it passes"
    largest, relative = certificate["largest_difference"], certificate["relative_difference"]
    if certificate["bit_equal"] and largest == relative == 0:
        return Statement("Certificate", f"The replay lands on {which} bit for bit.", "good")
    return Statement(
        "Certificate",
        f"The replay lands near {which}, but not on them bit for bit: single weights are off by up "
        f"to {number(largest)}, all weights together by {number(relative)} of the distance they "
        f"moved since the previous checkpoint ({number(certificate['tolerance'])} was allowed). "
        "The scores are those of the replayed run.",
        "fair",
    )


def _truncation(replayed: list[int] | None) -> Statement | None:
    if replayed is None:
        return None
    first, last = replayed
    if first == 0 or first >= last:
        return None
    return Statement(
        "Truncated",
        f"Only the effect of an example on the last {last - first} of {last} steps is counted. Its "
        f"effect on the steps up to {first} is missing.",
        "fair",
    )


def _other_labels(labels: dict[str, str]) -> Statement | None:
    if not labels:
        return None
    named = _listed([f"{index} as {label}" for index, label in labels.items()])
    return Statement(
        "Other labels",
        "For these training examples the score predicts the effect of a different label, not of "
        f"removal: {named}.",
    )


def _solver(solver: SolverRecord | None) -> Statement | None:
    if solver is None or (residual := solver.get("relative_residual")) is None:
        return None
    tolerance = solver.get("tolerance")
    asked = "" if tolerance is None else f" ({number(tolerance)} was asked for)"
    text = (
        f"{shorten(solver['name'], 40)} leaves a relative residual of at most "
        f"{number(residual['max'])}, {number(residual['median'])} for the median query{asked}."
    )
    reached = solver.get("reached")
    if reached is False:
        missed = "It did not reach its tolerance: the scores are not those of the inverse."
        return Statement("Inverse curvature", f"{text} {missed}", "fair")
    return Statement("Inverse curvature", text, "good" if reached else "")


def _spot_check(check: SpotCheck | None) -> Statement | None:
    if check is None or check.get("protocol") not in _PROTOCOLS or "alpha" not in check:
        return None
    seeds = check.get("num_seeds", 1)
    each = f", {seeds} seeds each" if seeds > 1 else ""
    models = (
        f"{check['num_subsets']} models retrained on a random {_percent(check['alpha'])} of the "
        f"training examples ({_PROTOCOLS[check['protocol']]}{each})"
    )
    lds = check.get("lds")
    if lds is None:
        if "reason" not in check:
            return None
        reason = shorten(check["reason"], 300)
        return Statement("Spot check", f"With {models}: {reason}", "fair")
    text = (
        f"Sums of scores rank {models} with a correlation of {_correlation(lds)}, averaged over "
        f"{_queries(check)}. This is the linear datamodeling score: 1 is perfect, 0 is chance."
    )
    if (limit := check.get("limit_by_seeds")) is not None:
        text += f" Noise between seeds allows no more than {_correlation(limit)}."
    over_subsets, over_queries = check.get("over_subsets"), check.get("over_queries")
    intervals = [
        f"{span} over {what}"
        for span, what in ((_span(over_subsets), "subsets"), (_span(over_queries), "queries"))
        if span
    ]
    if intervals:
        text += f" 95% interval: {', '.join(intervals)}."
    if (slope := check.get("slope")) is not None:
        text += f" On average, a measured change is {number(slope)} times the predicted one."
    low = over_subsets[0] if over_subsets else None
    if low is None or low > 0:
        return Statement("Spot check", text)
    return Statement(
        "Spot check",
        f"{text} These are too few retrainings to tell the scores from chance.",
        "fair",
    )


def _responses(check: SpotCheck | None) -> Statement | None:
    """The proximal Bregman response, which is what influence functions approximate."""
    if check is None or "damping" not in check or (rank := check.get("lds")) is None:
        return None
    text = (
        f"The scores of {check['num_subsets']} random training examples rank their proximal "
        "Bregman responses (the trained model fine-tuned to give up one example, at damping "
        f"{number(check['damping'])}) with a correlation of {_correlation(rank)}, averaged over "
        f"{_queries(check)}"
    )
    if span := _span(check.get("over_queries")):
        text += f" (95% interval over queries: {span})"
    if (slope := check.get("slope")) is not None:
        text += f". On average, a response is {number(slope)} times its score"
    return Statement("Proximal Bregman response", f"{text}.")


def _damping(sensitivity: DampingSensitivity | None) -> Statement | None:
    if sensitivity is None or not {"setting", "value", "0.1", "10"} <= sensitivity.keys():
        return None
    return Statement(
        "Damping",
        f"With a tenth of the {sensitivity['setting'].replace('_', ' ')} "
        f"({sensitivity['value']:.3g}), the rank correlation with these scores is "
        f"{_correlation(sensitivity['0.1'])}; with ten times as much it is "
        f"{_correlation(sensitivity['10'])}.",
    )


def _agreement(correlations: dict[str, float]) -> Statement | None:
    if not correlations:
        return None
    named = _listed(
        [f"{shorten(name, 60)} {_correlation(value)}" for name, value in correlations.items()]
    )
    return Statement("Other scores", f"Rank correlation with other scores: {named}.")


def _seeds(share: float | None) -> Statement | None:
    if share is None:
        return None
    return Statement(
        "Seeds",
        f"{_percent(share)} of the variance between retrained models comes from their seeds, not "
        "from the examples left out. No scores can explain that part.",
    )


def _listed(names: list[str], comma: str = ", ") -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{comma.join(names[:_LISTED])}{more}"


def _span(interval: list[float | None] | None) -> str:
    low, high = interval or (None, None)
    return "" if low is None or high is None else f"{_correlation(low)} to {_correlation(high)}"


def _correlation(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _percent(share: float) -> str:
    # All examples but one are not 100%.
    return f"{share:.0%}" if 0.01 <= share <= 0.99 else f"{100 * share:.6g}%"


def _queries(check: SpotCheck) -> str:
    count = check["num_queries"]
    return f"{count} quer{'y' if count == 1 else 'ies'}"
