"""A trajectory put together from checkpoints, for runs that nobody recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tda_lightning.optimizers import find_rule, known_optimizers, optimizer_name
from tda_lightning.records.trajectory import (
    FROM_CHECKPOINTS,
    Checkpoint,
    Facts,
    ParameterFact,
    Steps,
    Trajectory,
)
from tda_lightning.runtime.digests import digest
from tda_lightning.store.weight_files import SavedWeights, read_weights, weights_of

UNKNOWN = "an unknown optimizer"
Given = str | PathLike[str] | Mapping[str, Tensor]


def from_checkpoints(
    checkpoints: Sequence[Given],
    learning_rates: float | Sequence[float] | None = None,
    optimizer: Optimizer | str | None = None,
    steps: Sequence[int] | None = None,
) -> Trajectory:
    """See :meth:`tda_lightning.Trajectory.from_checkpoints`."""
    if isinstance(checkpoints, str | PathLike | Mapping) or not checkpoints:
        raise ValueError(
            "checkpoints must be a list of state dicts or files in order of training, such as "
            f"['epoch1.ckpt', 'epoch2.ckpt']; got {checkpoints!r:.80}."
        )
    saved = [_saved(given, number) for number, given in enumerate(checkpoints, start=1)]
    _require_alike(saved)
    ends = _steps(saved, steps)
    rates = _rates(saved, ends, learning_rates)
    name, settings = _optimizer(saved, optimizer)
    last = ends[-1]
    # Which steps each checkpoint stands for: those since the one before it.
    stands_for = torch.bucketize(torch.arange(1, last + 1), torch.tensor(ends))
    facts = Facts(
        parameters={
            name: ParameterFact(tuple(value.shape), str(value.dtype).removeprefix("torch."), 0)
            for name, value in saved[-1].tensors.items()
        },
        optimizer=name,
        num_examples=None,
        settings={
            FROM_CHECKPOINTS: [one.path for one in saved],
            "indices": "absent: the run was put together from checkpoints",
            "run_id": digest([[ends, rates, name], [sorted(one.tensors.items()) for one in saved]]),
        },
    )
    epochs = torch.tensor([0 if one.epoch is None else one.epoch for one in saved])
    table = Steps(
        epoch=epochs[stands_for],
        learning_rate=torch.tensor(rates, dtype=torch.float64)[stands_for, None],
        hyperparameters={
            key: torch.full((last, 1), value, dtype=torch.float64)
            for key, value in settings.items()
        },
        loss=torch.full((last,), math.nan, dtype=torch.float64),
        gradient_norm=torch.full((last,), math.nan, dtype=torch.float64),
        batch_offsets=torch.zeros(last + 1, dtype=torch.int64),
        example_offsets=torch.zeros(1, dtype=torch.int64),
        examples=torch.zeros(0, dtype=torch.int64),
        accumulation=torch.ones(last, dtype=torch.int64),
    )
    held = {end: Checkpoint(end, one.tensors, {}) for end, one in zip(ends, saved, strict=True)}
    return Trajectory(facts, table, held)


def _saved(given: Given, number: int) -> SavedWeights:
    if isinstance(given, str | PathLike):
        return read_weights(given)
    return weights_of(given, f"checkpoint {number}")


def _require_alike(saved: Sequence[SavedWeights]) -> None:
    """Refuse checkpoints of different models."""
    shapes = {name: tuple(value.shape) for name, value in saved[0].tensors.items()}
    for one in saved[1:]:
        own = {name: tuple(value.shape) for name, value in one.tensors.items()}
        differing = [n for n in {**shapes, **own} if shapes.get(n) != own.get(n)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{one.path} and {saved[0].path} are of different models: {name} has shape "
                f"{own.get(name, 'none')}, expected {shapes.get(name, 'none')}."
            )


def _steps(saved: Sequence[SavedWeights], given: Sequence[int] | None) -> list[int]:
    """Optimizer steps before each checkpoint, increasing."""
    if given is not None:
        ends = [int(step) for step in given]
        if len(ends) != len(saved):
            raise ValueError(
                f"steps must hold one number for each of the {len(saved)} checkpoints, got "
                f"{len(ends)}."
            )
    elif all(one.step is not None for one in saved):
        ends = [one.step for one in saved if one.step is not None]
    elif len(saved) == 1:
        ends = [1]
    else:
        first = next(one.path for one in saved if one.step is None)
        raise ValueError(
            f"{first} does not say after how many optimizer steps it was saved, as Lightning's "
            ".ckpt files do. Give steps=[...], one number for each checkpoint."
        )
    if ends != sorted(set(ends)) or ends[0] < 0 or ends[-1] < 1:
        raise ValueError(
            f"Checkpoints must be in order of training, each of a later step than the one before "
            f"it and the last after at least one; got steps {ends}."
        )
    return ends


def _rates(
    saved: Sequence[SavedWeights], ends: Sequence[int], given: float | Sequence[float] | None
) -> list[float]:
    """The rate of the steps up to each checkpoint; NaN where it is not known."""
    if given is None:
        return [_setting(one.groups, "lr") for one in saved]
    if isinstance(given, int | float):
        rates = [float(given)] * len(saved)
    else:
        rates = [float(rate) for rate in given]
        if len(rates) != len(ends):
            raise ValueError(
                f"learning_rates must be one number, or one for each of the {len(ends)} "
                f"checkpoints (of the steps before it), got {len(rates)}."
            )
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ValueError(f"learning_rates must be finite and not negative, got {rates}.")
    return rates


def _setting(groups: Sequence[Mapping[str, Any]], key: str) -> float:
    """A setting that all groups share; NaN where there is none."""
    values = {float(group[key]) for group in groups if key in group}
    return values.pop() if len(values) == 1 else math.nan


def _optimizer(
    saved: Sequence[SavedWeights], given: Optimizer | str | None
) -> tuple[str, dict[str, float]]:
    """Its name, and the settings of its rule."""
    if given is None:
        return UNKNOWN, {}
    groups: Sequence[Mapping[str, Any]]
    if isinstance(given, Optimizer):
        name, groups = optimizer_name(given), given.param_groups
    elif isinstance(given, str):
        name = given
        rule = find_rule(name)
        if rule is None:
            raise ValueError(
                f"There is no formula for the optimizer {name!r}. Known: "
                f"{', '.join(known_optimizers())}. Without one, leave optimizer out: influence "
                "functions and TracIn do not need it."
            )
        groups = saved[-1].groups
        if not groups:
            raise ValueError(
                f"The checkpoints do not have the settings of {name}. Give the optimizer itself, "
                "as it was made for training."
            )
        build: Callable[..., Optimizer] = rule.optimizer
        defaults = build([nn.Parameter(torch.zeros(1, 1))], lr=0.0).defaults
        groups = [{**defaults, **group} for group in groups]
    else:
        raise TypeError(
            "optimizer must be an optimizer as made for training, its name, or None; got "
            f"{given!r:.80}."
        )
    rule = find_rule(name)
    if rule is None:
        return name, {}
    settings = [rule.read(dict(group)) for group in groups]
    if any(own != settings[0] for own in settings[1:]):
        raise ValueError(
            "The optimizer has parameter groups of different settings, and checkpoints do not say "
            "which parameter is in which group. Record the run with TrajectoryRecorder."
        )
    return name, settings[0]
