"""What a spot check (``tda evaluate spot_check=true``) found out about the scores, in sentences.

It is kept in the provenance as ``trust``, whose keys ``tda_lightning.cli.trust`` lists. What does
not have the agreed form is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from tda_lightning.report.charts import number
from tda_lightning.report.examples import shorten
from tda_lightning.report.provenance import one_line
from tda_lightning.report.statement import Statement, is_count, is_number

_OTHERS = 12  # estimators whose agreement is listed
_MADE = {
    "single_run": "the recorded run replayed, what is left out at weight 0",
    "algorithm": "trained anew on the smaller training set, from fresh seeds",
}


def found_out(provenance: Mapping[str, Any]) -> list[Statement]:
    """How well the scores predicted retraining, and what else tells how far to trust them."""
    trust = provenance.get("trust")
    if not isinstance(trust, Mapping):
        return []
    parts = (
        _retrainings(trust.get("spot_check")),
        _responses(trust.get("pbrf")),
        _damping(trust.get("damping")),
        _agreement(trust.get("agreement")),
        _seeds(trust.get("seed_variance_share")),
    )
    return [part for part in parts if part is not None]


def _retrainings(found: Any) -> Statement | None:
    if not isinstance(found, Mapping):
        return None
    protocol = found.get("protocol")
    if not isinstance(protocol, str) or protocol not in _MADE:
        return None
    subsets, queries, share = (found.get(n) for n in ("num_subsets", "num_queries", "alpha"))
    if not (is_count(subsets) and is_count(queries) and _is_share(share)):
        return None
    seeds = found.get("num_seeds")
    each = f", {seeds} seeds each" if is_count(seeds) and seeds > 1 else ""
    judged = f"{subsets} models retrained on a random {_percent(share)} of the training examples"
    made = f"{judged} ({_MADE[protocol]}{each})"
    lds, reason = found.get("lds"), found.get("reason")
    if lds is None and isinstance(reason, str):
        return Statement("Spot check", f"By {made}: {shorten(one_line(reason), 300)}", "fair")
    if not _is_correlation(lds):
        return None
    text = (
        f"The scores' sums ranked {made} with a correlation of {_correlation(lds)}, averaged over "
        f"{_queries(queries)}: their linear datamodeling score. 1 is perfect, 0 is chance."
    )
    over_subsets, over_queries = (_interval(found.get(n)) for n in ("over_subsets", "over_queries"))
    spans = [
        f"{_correlation(span[0])} to {_correlation(span[1])} over {what}"
        for span, what in ((over_subsets, "subsets"), (over_queries, "queries"))
        if span is not None
    ]
    if spans:
        text += f" 95% interval {', '.join(spans)}."
    if over_subsets is None or over_subsets[0] > 0:
        return Statement("Spot check", text)
    return Statement(
        "Spot check", f"{text} So few retrainings do not tell these scores from chance.", "fair"
    )


def _responses(found: Any) -> Statement | None:
    """The proximal Bregman response, the question that influence functions answer."""
    if not isinstance(found, Mapping):
        return None
    examples, queries, rank = (found.get(n) for n in ("num_subsets", "num_queries", "lds"))
    damping, slope = found.get("damping"), found.get("slope")
    if not (is_count(examples) and is_count(queries) and _is_correlation(rank)):
        return None
    if not is_number(damping):
        return None
    text = (
        f"The scores of {examples} random training examples rank their proximal Bregman responses "
        f"(the trained model fine-tuned to give one example up, at damping {number(damping)}) with "
        f"a correlation of {_correlation(rank)}, averaged over {_queries(queries)}"
    )
    if span := _interval(found.get("over_queries")):
        text += f" (95% interval over queries {_correlation(span[0])} to {_correlation(span[1])})"
    if is_number(slope):
        text += f"; a response is {number(slope)} times its score on average"
    return Statement("Proximal Bregman response", f"{text}.")


def _damping(found: Any) -> Statement | None:
    if not isinstance(found, Mapping):
        return None
    setting, value = found.get("setting"), found.get("value")
    less, more = found.get("0.1"), found.get("10")
    if not (
        setting in ("damping", "relative_damping")
        and is_number(value)
        and _is_correlation(less)
        and _is_correlation(more)
    ):
        return None
    return Statement(
        "Damping",
        f"With a tenth of the {setting.replace('_', ' ')} ({value:.3g}) the scores' ranks "
        f"correlate with these by {_correlation(less)}, with ten times as much by "
        f"{_correlation(more)}.",
    )


def _agreement(found: Any) -> Statement | None:
    if not isinstance(found, Mapping):
        return None
    known = {str(name): value for name, value in found.items() if _is_correlation(value)}
    if not known:
        return None
    named = ", ".join(
        f"{shorten(one_line(name), 60)} {_correlation(value)}"
        for name, value in list(known.items())[:_OTHERS]
    )
    more = f" and {len(known) - _OTHERS} more" if len(known) > _OTHERS else ""
    return Statement("Other scores", f"Rank correlation of these with others: {named}{more}.")


def _seeds(share: Any) -> Statement | None:
    if not _is_share(share):
        return None
    return Statement(
        "Seeds",
        f"{_percent(share)} of the variance between retrained models comes from their seeds, not "
        "from the examples left out. No scores can explain that part.",
    )


def _interval(found: Any) -> tuple[float, float] | None:
    if not isinstance(found, list) or len(found) != 2 or not all(map(_is_correlation, found)):
        return None
    return found[0], found[1]


def _is_correlation(value: Any) -> TypeGuard[float]:
    return is_number(value) and abs(value) <= 1 + 1e-9


def _is_share(value: Any) -> TypeGuard[float]:
    return is_number(value) and 0 <= value <= 1


def _correlation(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _percent(share: float) -> str:
    # All examples but one are not all of them.
    return f"{share:.0%}" if 0.01 <= share <= 0.99 else f"{100 * share:.6g}%"


def _queries(count: int) -> str:
    return f"{count} quer{'y' if count == 1 else 'ies'}"
