"""What several processes need to score together."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import replace

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.processes import from_all
from tda_lightning.store.tensor_cache import TensorCache


def require_scorable(trainer: Trainer) -> None:
    """Check that every process of ``trainer`` will hold the whole model, and that what the
    processes compute comes back.

    Raises:
        ValueError: not so.
    """
    strategy, reason = trainer.strategy, None
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        reason = "spreads the model over processes, expected the whole model in each of them"
    elif isinstance(strategy.launcher, _MultiProcessingLauncher):
        reason = "ends its processes with each pass, and what they computed with them"
    if reason is not None:
        raise ValueError(
            f"{type(strategy).__name__} {reason}: its scores would be wrong. Give attribute() a "
            "Trainer(strategy='ddp') in a script, or one with devices=1. The trajectory may have "
            "been recorded with any strategy."
        )


def written_by_first(trajectory: Trajectory) -> Trajectory:
    """``trajectory``, to whose folder only the first process adds curvature and features: the
    others keep what they have found to themselves."""
    curvature, features = trajectory.curvature, trajectory.features
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    if rank == 0 or not isinstance(curvature, TensorCache):
        return trajectory
    return replace(trajectory, curvature=ChainMap({}, curvature), features=ChainMap({}, features))


def require_same_plan(passes: Sequence[tuple[str, int]]) -> None:
    """Check that every process is about to make the same passes: they add up what they find.

    Raises:
        RuntimeError: in every process, when one plans others.
    """
    plans = from_all(list(passes))
    for rank, plan in enumerate(plans):
        if plan != plans[0]:
            raise RuntimeError(
                f"Process {rank} plans {len(plan)} passes over the training set, process 0 "
                f"{len(plans[0])}; expected the same. Give every process the same arguments, "
                "weights and data, and the same trajectory folder with its curvature."
            )
