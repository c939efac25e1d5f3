"""``tda evaluate spot_check=true``: what is found out about scores goes into their provenance."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import cast

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.evaluation_limits import Limits
from tda_lightning.cli.evaluation_table import JudgedScores, seed_variance_share
from tda_lightning.cli.matched_keep import keep_of
from tda_lightning.cli.retraining import RecordedRun
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.evaluation import GroundTruth, NothingToRankError, agreement
from tda_lightning.records.provenance import DampingSensitivity, SpotCheck, Trust, well_formed
from tda_lightning.records.scores import Scores
from tda_lightning.runtime.progress import SlowProgress

_FACTORS = (0.1, 10.0)


def spot_check(
    judged: JudgedScores,
    scores: Mapping[str, Scores],
    truth: GroundTruth,
    limits: Limits,
    run: RecordedRun,
    command: str,
) -> Trust:
    """How far the scores ``judged`` can be trusted.

    A check by retraining replaces an earlier one; one by the proximal Bregman response stands
    beside it.

    Args:
        judged: their judgement, which names them among ``scores``.
        scores: all that were judged together, and others to compare with.
        truth: what they were judged by.
        limits: what there is to reach.
        run: the recorded run.
        command: the command that asked.
    """
    own = scores[judged.name]
    row = judged.as_json()
    keys = ("lds", "reason", "over_queries", "over_subsets", "slope")
    check = cast(SpotCheck, {key: row[key] for key in keys if key in row})
    check["protocol"] = truth.protocol
    check["num_subsets"], check["num_seeds"] = truth.seeds.shape
    check["alpha"] = truth.fraction
    check["num_queries"] = own.num_queries
    if limits.seeds is not None:
        check["limit_by_seeds"] = limits.seeds.over_subsets.value
    earlier = well_formed(own.provenance).get("trust", {})
    trust: Trust = {}
    if truth.protocol == "pbrf":
        check["damping"] = run.config.damping
        trust["pbrf"] = check
        if "spot_check" in earlier:
            trust["spot_check"] = earlier["spot_check"]
        if "seed_variance_share" in earlier:
            trust["seed_variance_share"] = earlier["seed_variance_share"]
    else:
        trust["spot_check"] = check
        if "pbrf" in earlier:
            trust["pbrf"] = earlier["pbrf"]
    if own.is_complete:
        others = {name: other for name, other in scores.items() if name != judged.name}
        agreements = {
            name: _agreement(own, other) for name, other in others.items() if other.is_complete
        }
        if known := {name: value for name, value in agreements.items() if value is not None}:
            trust["agreement"] = known
    if (damping := damping_sensitivity(own, run)) is not None:
        trust["damping"] = damping
    if (share := seed_variance_share(truth)) is not None:
        trust["seed_variance_share"] = share
    trust["command"] = command
    trust["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return trust


def _agreement(own: Scores, other: Scores) -> float | None:
    """Rank correlation; None where the other scores are equal for all training examples."""
    try:
        return agreement(own, other).value
    except NothingToRankError:
        return None


def damping_sensitivity(scores: Scores, run: RecordedRun) -> DampingSensitivity | None:
    """How an influence function's scores change with its damping.

    None for other estimators, for solvers (each damping would cost as many solutions again) and for
    a damping that follows from the run's learning rates. The curvature comes from the cache of the
    attribution.
    """
    provenance = well_formed(scores.provenance)
    settings = provenance.get("settings")
    if provenance.get("estimator") != "InfluenceFunction" or settings is None:
        return None
    if scores.members is not None:
        return None  # the run alone would be compared with the mean over several
    absolute = settings.get("damping")
    if settings.get("solver") is not None or isinstance(absolute, str):
        return None
    name = "relative_damping" if absolute is None else "damping"
    given = settings.get(name)
    value = 0.1 if given is None else float(given)
    if not value > 0:  # ten times 0 is 0
        return None
    sensitivity = cast(DampingSensitivity, {"setting": name, "value": value})
    with SlowProgress("Damping", len(_FACTORS)) as progress:
        for factor in _FACTORS:
            estimator = InfluenceFunction(**{**settings, name: value * factor})
            attribution = AttributionModule(run.module, run.trajectory, estimator, run.task)
            other = attribution.attribute(
                run.train,
                run.queries,
                run.config.batch_size,
                trainer=silent_trainer(),
                self_influence=False,
                keep=keep_of(scores),
                draws=provenance["what_if"].get("draws", 0) if "what_if" in provenance else None,
            )
            if (correlation := _agreement(scores, other)) is not None:
                sensitivity["0.1" if factor < 1 else "10"] = correlation
            progress.advance()
    return sensitivity
