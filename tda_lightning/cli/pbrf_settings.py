"""What ``tda evaluate protocol=pbrf`` leaves to the scores: the damping."""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import DictConfig

from tda_lightning.records.provenance import well_formed
from tda_lightning.records.scores import Scores


def absolute_damping(scores: Mapping[str, Scores]) -> float:
    """The absolute damping that all influence functions among ``scores`` share.

    A relative damping differs between layers, and the response has only one.

    Raises:
        ValueError: there is none, or there are several.
    """
    dampings: dict[str, float] = {}
    for name, judged in scores.items():
        value = well_formed(judged.provenance).get("settings", {}).get("damping")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            dampings[name] = float(value)
    if len(set(dampings.values())) == 1:
        return next(iter(dampings.values()))
    got = ", ".join(f"{value:g} of {name}" for name, value in dampings.items()) or "none"
    raise ValueError(
        "The proximal Bregman response needs one absolute damping: expected damping=NUMBER, or "
        f"scores of influence functions that agree on one, got {got}. For scores with an absolute "
        "damping: tda attribute estimator=influence estimator.damping=NUMBER. The relative damping "
        "that is their default is a different number in every layer."
    )


def complete_pbrf_settings(config: DictConfig, scores: Mapping[str, Scores]) -> None:
    """Write into ``config`` what the protocol *pbrf* leaves open: the damping, and that each
    response gives up one example.

    Raises:
        ValueError: settings that contradict the protocol.
    """
    if config.protocol != "pbrf":
        if config.damping is not None:
            raise ValueError(f"damping is for protocol=pbrf, got protocol={config.protocol}.")
        return
    if config.leave_out not in (None, 1):
        raise ValueError(
            f"protocol=pbrf gives up one example at a time, got leave_out={config.leave_out}."
        )
    if config.removal is not None or config.token_removal is not None:
        raise ValueError("removal is by retraining: expected protocol=single_run or algorithm.")
    config.leave_out = 1
    if config.damping is None:
        config.damping = absolute_damping(scores)
    if not config.damping > 0:
        raise ValueError(
            f"damping must be positive for the response to be unique, got {config.damping}."
        )
