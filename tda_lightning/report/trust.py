"""What the provenance says of how far the scores reach and how exact they are, in sentences.

As everywhere in the report, what does not have the agreed form is left out here, and shown as it
stands among the rest of the provenance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tda_lightning.records.scores import Scores
from tda_lightning.report.charts import number
from tda_lightning.report.examples import shorten
from tda_lightning.report.provenance import one_line
from tda_lightning.report.spot_check import found_out
from tda_lightning.report.statement import Statement, is_count, is_number

_NAMED = 12  # relabelled examples that are listed; of more, their number is told


def statements(provenance: Mapping[str, Any]) -> list[Statement]:
    """The question that the scores answer, the certificate, what both are limited to, and what a
    spot check found."""
    question = provenance.get("question")
    asked = None
    if isinstance(question, str) and question:
        asked = Statement("The question", f"{question[:1].upper()}{shorten(question[1:], 400)}.")
    found = (
        asked,
        _certificate(provenance),
        _truncation(provenance),
        _relabelling(provenance),
        _solver(provenance),
    )
    return [*(one for one in found if one is not None), *found_out(provenance)]


def looked_at(scores: Scores) -> list[Statement]:
    """How many training examples were scored, where it was not all of them."""
    if scores.is_complete:
        return []
    about = scores.provenance.get("candidates")
    about = about if isinstance(about, Mapping) else {}
    place, metric = (
        shorten(about[name], 60) if isinstance(about.get(name), str) else ""
        for name in ("features", "metric")
    )
    compared = f" by the {place}" if place else ""
    compared += f" ({metric})" if metric else ""
    return [
        Statement(
            "Looked at",
            f"Only the {scores.num_scored:,} of {scores.num_train:,} training examples nearest to "
            f"each query{compared} were scored. The others have no score: a stronger proponent or "
            "opponent may be among them.",
            "fair",
        )
    ]


def relabelled(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Their other labels, by the index of the training examples."""
    labels = provenance.get("relabel")
    if not isinstance(labels, Mapping):
        return {}
    return {str(index): shorten(one_line(label), 40) for index, label in labels.items()}


def _certificate(provenance: Mapping[str, Any]) -> Statement | None:
    found = provenance.get("certificate")
    if not isinstance(found, Mapping):
        return None
    count, equal = found.get("checkpoints"), found.get("bit_equal")
    largest, relative = (found.get(f"{kind}_difference") for kind in ("largest", "relative"))
    if not (
        is_count(count) and isinstance(equal, bool) and is_number(largest) and is_number(relative)
    ):
        return None
    recorded = provenance.get("checkpoints")
    # The first one recorded is where the run began.
    every = isinstance(recorded, list) and count == len(recorded) - 1
    which = f"{'all' if every else 'the'} {count} recorded checkpoints"
    if count == 1:
        which = "the recorded checkpoint"
    which += "" if every else " that it passes"
    if equal and largest == relative == 0:
        return Statement("Certificate", f"Replayed, the run lands on {which} bit for bit.", "good")
    tolerance = found.get("tolerance")
    limit = f" ({number(tolerance)} was allowed)" if is_number(tolerance) else ""
    return Statement(
        "Certificate",
        f"Replayed, the run lands near {which}, not on them bit for bit: a single weight is off by "
        f"up to {number(largest)}, all weights together by {number(relative)} of how far they "
        f"moved since the checkpoint before{limit}. The scores are those of the replayed run.",
        "fair",
    )


def _truncation(provenance: Mapping[str, Any]) -> Statement | None:
    steps = provenance.get("replayed_steps")
    if not isinstance(steps, list) or len(steps) != 2 or not all(map(is_count, steps)):
        return None
    first, last = steps
    if first == 0 or first >= last:
        return None
    return Statement(
        "Truncated",
        f"Only what the last {last - first} of {last} steps did with an example is counted: its "
        f"part in the steps up to {first} is missing.",
        "fair",
    )


def _relabelling(provenance: Mapping[str, Any]) -> Statement | None:
    labels = relabelled(provenance)
    if not labels:
        return None
    few = list(labels.items())[:_NAMED]
    named = ", ".join(f"{index} as {label}" for index, label in few)
    more = f" and {len(labels) - len(few)} more" if len(labels) > len(few) else ""
    return Statement(
        "Other labels",
        "For these training examples a score predicts the effect of another label, not of removal: "
        f"{named}{more}.",
    )


def _solver(provenance: Mapping[str, Any]) -> Statement | None:
    """How well the linear systems behind influence functions were solved."""
    found = provenance.get("solver")
    if not isinstance(found, Mapping):
        return None
    name, reached, residual = (found.get(k) for k in ("name", "reached", "relative_residual"))
    if not (isinstance(name, str) and isinstance(residual, Mapping)):
        return None
    largest, median, tolerance = residual.get("max"), residual.get("median"), found.get("tolerance")
    if not (is_number(largest) and is_number(median)):
        return None
    asked = f" ({number(tolerance)} was asked for)" if is_number(tolerance) else ""
    text = (
        f"{shorten(one_line(name), 40)} leaves a relative residual of {number(largest)} at most, "
        f"{number(median)} for the median query{asked}."
    )
    if reached is not False:
        return Statement("Inverse curvature", text, "good" if reached is True else "")
    missed = "It did not reach its tolerance: the scores are not those of the inverse."
    return Statement("Inverse curvature", f"{text} {missed}", "fair")
