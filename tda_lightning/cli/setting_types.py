"""The types of the commands' own settings, so that a wrong one is refused in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tda_lightning.runtime.setting_types import require_type

# The type of a setting, and a value that would do. The others are checked where they are used.
_TYPES: dict[str, tuple[Any, str]] = {
    "alpha": (float | None, ""),
    "anchors": (int, ""),
    "at": (Sequence[int] | None, "at=[300] for the checkpoint at step 300"),
    "at_step": (int | None, ""),
    "baselines": (Sequence[str] | None, "baselines=[random]"),
    "batch_size": (int, ""),
    "bound": (float, ""),
    "by": (str, ""),
    "bytes_per_example": (int, ""),
    "by_token": (str | None, "by_token=train"),
    "ckpt": (str | None, ""),
    "columns": (Sequence[str] | None, "columns=[origin]"),
    "compare": (Sequence[str] | None, "compare=[other.h5]"),
    "damping": (float | None, ""),
    "directions": (int, ""),
    "estimators": (Mapping, ""),
    "drop": (str | Sequence[str] | None, "drop=edits.json"),
    "edits": (str | None, "edits=edits.json"),
    "epochs": (int | None, ""),
    "examples": (int, ""),
    "extra": (str | None, "extra=runs/mnli/selection.json"),
    "fraction": (float, ""),
    "judge": (Sequence[str] | None, "judge=[class,cardinality]"),
    "k": (int, ""),
    "host": (str, ""),
    "leave_out": (int | None, ""),
    "machines": (int, ""),
    "marked": (Mapping | None, "marked={origin: train}"),
    "max_megabytes": (float, ""),
    "members": (int, ""),
    "min_count": (int, ""),
    "neighbours": (int, ""),
    "num_examples": (int | None, ""),
    "num_subsets": (int | None, ""),
    "num_suspects": (int, ""),
    "overwrite": (bool, ""),
    "penalty": (float, ""),
    "pool": (Mapping | None, "pool={subset_seed: 1} for the training set that this seed draws"),
    "port": (int, ""),
    "price_per_hour": (float | None, ""),
    "processes": (int, ""),
    "queries": (
        Sequence[int] | None,
        "queries=[5] for row 5 or queries=[0,1,2] for the first three",
    ),
    "rank": (int | None, ""),
    "rate": (float | None, ""),
    "read_gb_per_second": (float | None, ""),
    "retrain": (bool, ""),
    "replicas": (int, ""),
    "relabel": (Mapping | None, "relabel={3: 7} for label 7 of example 3"),
    "scores": (str | Sequence[str] | None, ""),
    "seed": (int, ""),
    "seeds": (int, ""),
    "self_influence": (bool | None, ""),
    "share": (float, ""),
    "similarity": (bool, ""),
    "simulate": (Sequence[int] | None, "simulate=[1,5]"),
    "simulate_queries": (int, ""),
    "simulate_rate": (float, ""),
    "spot_check": (bool, ""),
    "subclass": (str | None, "subclass='gold label'"),
    "threads": (int | None, ""),
    "steps": (int, ""),
    "target": (Mapping | None, "target={queries: hans} for the queries with this setting"),
    "together": (int, ""),
    "trust_config": (bool, ""),
}
_POSITIVE = (
    *("batch_size", "directions", "examples", "k", "processes", "seeds", "simulate_queries"),
    "together",
)


def require_setting_types(config: DictConfig) -> None:
    """Check a command's own settings.

    Raises:
        TypeError: one has another type than it must have.
        ValueError: a number that must be positive is not.
    """
    for name, (hint, example) in _TYPES.items():
        if name not in config or OmegaConf.is_missing(config, name):
            continue
        value = config[name]
        if name == "k" and value is None and "table" in config:  # tda export: all pairs
            continue
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        require_type(name, plain, hint, example)
        if name in _POSITIVE and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
