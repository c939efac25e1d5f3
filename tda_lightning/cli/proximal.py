"""The proximal Bregman response of a recorded run: at which damping, and in double precision."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory


def damping_of(scores: Mapping[str, Scores]) -> float:
    """The absolute damping of influence functions among ``scores``, by their names.

    A relative damping is another number for each layer, and the response has but one.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = {}
    for name, one in scores.items():
        settings = one.provenance.get("settings")
        value = settings.get("damping") if isinstance(settings, Mapping) else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value)
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    got = ", ".join(f"{value:g} of {name}" for name, value in found.items()) or "none"
    raise ValueError(
        "The proximal Bregman response needs one absolute damping: expected damping=NUMBER, or "
        f"scores of influence functions that agree in one, got {got}. Scores with an absolute "
        "damping: tda attribute estimator=influence estimator.damping=NUMBER. The relative damping "
        "that is their default is another number in every layer."
    )


def settle_response(config: DictConfig, scores: Mapping[str, Scores]) -> None:
    """Write into ``config`` what the protocol *pbrf* leaves open: the damping, and that every
    example is given up alone.

    Raises:
        ValueError: settings that do not go with the protocol.
    """
    if config.protocol != "pbrf":
        if config.damping is not None:
            raise ValueError(f"damping is for protocol=pbrf, got protocol={config.protocol}.")
        return
    if config.leave_out not in (None, 1):
        raise ValueError(
            f"protocol=pbrf gives up one example each, got leave_out={config.leave_out}."
        )
    if config.removal is not None:
        raise ValueError("removal is by retraining: expected protocol=single_run or algorithm.")
    config.leave_out = 1
    if config.damping is None:
        config.damping = damping_of(scores)
    if not config.damping > 0:
        raise ValueError(f"damping must be positive to have one answer, got {config.damping}.")


def total_damping(trajectory: Trajectory, damping: float) -> float:
    """With the recorded weight decay added, as influence functions add it.

    Raises:
        ValueError: parameters differ in their weight decay.
    """
    rates = trajectory.steps.hyperparameters["weight_decay"][trajectory.last_step - 1]
    decays = {float(rates[fact.group]) for fact in trajectory.facts.parameters.values()}
    if len(decays) > 1:
        raise ValueError(
            "The proximal Bregman response needs one weight decay for all parameters, got "
            f"{sorted(decays)}. Judge by protocol=single_run."
        )
    return damping + decays.pop()


class _InDouble(torch.utils.data.Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return pytree.tree_map(_doubled, self.dataset[index])


def _doubled(leaf: Any) -> Any:
    exact = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.double() if exact else leaf


def in_double(module: nn.Module, *datasets: Any) -> tuple[Any, ...]:
    """A copy of the module, and the data sets, in double precision."""
    return copy.deepcopy(module).double(), *map(_InDouble, datasets)
