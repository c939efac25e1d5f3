"""The settings that determine an inverse curvature, checked, and the damping that they mean."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tda_lightning.curvature import (
    check_dense_side,
    check_kind,
    check_statistics,
    curvature_of,
    unit_matrices,
)
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.optimizers import applied_rates, rule_if_known, weight_decay
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.provenance import Damping
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.session.session import Session
from tda_lightning.solvers import Solver


class InverseSettings(Protocol):
    """The settings of an estimator that determine its inverse curvature; see
    :class:`~tda_lightning.estimators.InfluenceFunction` for what they mean."""

    curvature: str
    damping: float | str | None
    relative_damping: float | None
    statistics: str
    dense_side: int | None
    seed: int
    solver: Solver | None


def check_inverse(settings: InverseSettings) -> None:
    """Refuse impossible settings.

    Raises:
        ValueError: says which.
    """
    check_kind(settings.curvature)
    check_statistics(settings.statistics, settings.curvature)
    check_dense_side(settings.dense_side)
    if settings.damping is not None and settings.relative_damping is not None:
        raise ValueError(
            f"Give damping (got {settings.damping}) or relative_damping (got "
            f"{settings.relative_damping}), not both."
        )
    if isinstance(settings.damping, str) and settings.damping != "segment":
        raise ValueError(
            f"damping must be a number, 'segment' (1 over the sum of the applied rates) or null "
            f"(None), got {settings.damping!r}."
        )
    if settings.solver is not None and not callable(getattr(settings.solver, "solve", None)):
        raise ValueError(
            "solver must be one of tda_lightning.solvers (on the command line solver=cg and the "
            f"like) or null (None), got {settings.solver!r}."
        )
    for name in ("damping", "relative_damping"):
        value = getattr(settings, name)
        if isinstance(value, (int, float)) and value < 0:
            raise ValueError(f"{name} must not be negative, got {value}.")


def relative_damping(settings: InverseSettings) -> float:
    """The multiple of a mean eigenvalue, where the damping is relative."""
    return 0.1 if settings.relative_damping is None else settings.relative_damping


def absolute_damping(settings: InverseSettings, trajectory: Trajectory) -> float | None:
    """The damping as a number; None where it is relative to the curvature.

    Raises:
        UnsupportedTrainingError: ``segment`` for a run that was not trained by SGD.
    """
    if not isinstance(settings.damping, str):
        return settings.damping
    rule = rule_if_known(trajectory)
    if rule is None or not rule.linear:
        raise UnsupportedTrainingError(
            "damping='segment' is 1 / (eta T) of plain gradient descent, and the run was trained "
            f"with {trajectory.facts.optimizer}, whose steps are not in proportion to gradients. "
            "Give a number, or relative_damping."
        )
    time = float(applied_rates(trajectory, slice(None)).sum(0).max())
    if time <= 0:
        raise UnsupportedTrainingError("damping='segment' is 1 / (eta T), and all rates are 0.")
    return 1 / time


def damping_record(settings: InverseSettings, trajectory: Trajectory, whole: str) -> Damping:
    """The damping for the provenance; ``whole``: what a relative one is relative to."""
    absolute = absolute_damping(settings, trajectory)
    if absolute is not None:
        return {"absolute": absolute}
    return {f"relative to {whole}": relative_damping(settings)}  # type: ignore[misc]


def last_interval(trajectory: Trajectory) -> tuple[int, int]:
    """The steps before the last checkpoint that have recorded statistics, else all of them."""
    with_examples = [
        interval
        for interval in sorted(trajectory.statistics, reverse=True)
        if any(float(block.examples) for block in trajectory.statistics[interval].values())
    ]
    return with_examples[0] if with_examples else (0, trajectory.last_step)


def final_curvature(settings: InverseSettings, session: Session) -> dict[str, Spectrum]:
    """The curvature of the last checkpoint in an eigenbasis, by unit."""
    return curvature_of(
        settings.statistics,
        settings.curvature,
        session,
        last_interval(session.trajectory),
        [session.trajectory.last_step],
        seed=settings.seed,
        dense_side=settings.dense_side,
        used=(0, session.trajectory.last_step),
    )


def decay_by_unit(session: Session, kind: str) -> dict[str, Tensor]:
    """Weight decay of every parameter at the last step, by unit of curvature: the optimizer's, and
    what a penalty in the loss amounts to."""
    trajectory = session.trajectory
    last = trajectory.last_step
    rates = weight_decay(trajectory, slice(last - 1, last))[0]
    penalties = session.task.penalty.strengths
    filled = {
        key: torch.full(
            fact.shape, float(rates[fact.group]) + penalties.get(key, 0.0), dtype=torch.float64
        )
        for key, fact in trajectory.facts.parameters.items()
    }
    matrices = {block.name: block.matrix(filled) for block in session.blocks}
    return {
        name: matrix.to(session.device, session.dtype)
        for name, matrix in unit_matrices(kind, matrices).items()
    }
