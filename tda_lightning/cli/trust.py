"""What a spot check says of scores, kept in their provenance as ``trust`` for the report.

Keys, each where it is known::

    spot_check              lds (null where undefined, with a reason), over_queries and over_subsets
                            (95% intervals), slope, protocol, num_subsets, alpha, num_seeds,
                            num_queries
    pbrf                    the same by the proximal Bregman response, with its damping
    agreement               by the name of other scores: Spearman's correlation, mean over queries;
                            only of scores that vary
    damping                 of influence functions, other estimators have none: setting, value, and
                            by factor: Spearman's correlation with the scores of so many times it
    seed_variance_share     part of the measurements' variance that is between seeds of one subset
    command, created        of the last check

A check by retraining takes the place of an earlier one, one by the proximal Bregman response stands
beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from lightning.pytorch import Trainer

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.judged import Judged, seed_share
from tda_lightning.cli.retraining import Parts
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.evaluation import GroundTruth, agreement
from tda_lightning.evaluation.lds import NothingToRankError
from tda_lightning.records.scores import Scores
from tda_lightning.runtime.progress import SlowProgress

_FACTORS = (0.1, 10.0)


def trust(
    judged: Judged, scores: Mapping[str, Scores], truth: GroundTruth, parts: Parts, command: str
) -> dict[str, Any]:
    """What is known of how far the scores ``judged`` can be trusted.

    Args:
        judged: their judgement; it names them among ``scores``.
        scores: all that were judged together, and others to compare them with.
        truth: what they were judged by.
        parts: the recorded run.
        command: that asked.
    """
    mine = scores[judged.name]
    subsets, seeds = truth.seeds.shape
    row = judged.as_json()
    about: dict[str, Any] = {
        "protocol": truth.protocol,
        "num_subsets": subsets,
        "alpha": truth.fraction,
        "num_seeds": seeds,
        "num_queries": mine.num_queries,
    }
    told = ("lds", "reason", "over_queries", "over_subsets", "slope")
    check = {**{name: row[name] for name in told if name in row}, **about}
    earlier = mine.provenance.get("trust")
    kept: Mapping[str, Any] = earlier if isinstance(earlier, Mapping) else {}
    found: dict[str, Any] = {}
    if truth.protocol == "pbrf":
        keys = ("spot_check", "seed_variance_share")
        found = {name: kept[name] for name in keys if name in kept}
        found["pbrf"] = {**check, "damping": parts.config.damping}
    else:
        found["spot_check"] = check
        if "pbrf" in kept:
            found["pbrf"] = kept["pbrf"]
    others = {
        name: other for name, other in scores.items() if name != judged.name and other.is_complete
    }
    others = others if mine.is_complete else {}
    agreements = {name: _agreement(mine, other) for name, other in others.items()}
    if known := {name: value for name, value in agreements.items() if value is not None}:
        found["agreement"] = known
    if (damping := damping_sensitivity(mine, parts)) is not None:
        found["damping"] = damping
    if (share := seed_share(truth)) is not None:
        found["seed_variance_share"] = share
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**found, "command": command, "created": created}


def _agreement(mine: Scores, other: Scores) -> float | None:
    """None where the other scores are the same for all training examples."""
    try:
        return agreement(mine, other).value
    except NothingToRankError:
        return None


def damping_sensitivity(scores: Scores, parts: Parts) -> dict[str, Any] | None:
    """How the scores of an influence function change with its damping; None for other estimators,
    solvers other than the eigenbasis, and the damping that is made of the run's rates.

    Its curvature is found where the attribution has kept it.
    """
    made = scores.provenance
    settings = made.get("settings")
    if made.get("estimator") != "InfluenceFunction" or not isinstance(settings, Mapping):
        return None
    if settings.get("solver") is not None or isinstance(settings.get("damping"), str):
        return None  # as many solutions again, or a damping that the run itself gives
    absolute = settings.get("damping")
    name = "relative_damping" if absolute is None else "damping"
    given = settings.get(name)
    value = 0.1 if given is None else float(given)
    if not value > 0:  # ten times none is none
        return None
    found: dict[str, Any] = {"setting": name, "value": value}
    with SlowProgress("Damping", len(_FACTORS)) as progress:
        for factor in _FACTORS:
            estimator = InfluenceFunction(**{**settings, name: value * factor})
            attribution = AttributionModule(parts.module, parts.trajectory, estimator, parts.task)
            other = attribution.attribute(
                parts.data.train_dataset,
                parts.data.query_dataset,
                parts.config.batch_size,
                trainer=quiet_trainer(),
                self_influence=False,
            )
            if (alike := _agreement(scores, other)) is not None:
                found[f"{factor:g}"] = alike
            progress.advance()
    return found


def quiet_trainer() -> Trainer:
    """For an attribution that nobody waits for."""
    return Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        inference_mode=False,
    )
