"""What several processes need to score together."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import replace

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tda_lightning.records.trajectory import Trajectory
from tda_lightning.store.tensor_cache import TensorCache


def require_scorable(trainer: Trainer) -> None:
    """Check that what the processes of ``trainer`` compute comes back.

    Every process holds the whole model, whatever the strategy: FSDP's too, for which only the
    examples are shared.

    Raises:
        ValueError: not so.
    """
    strategy, reason = trainer.strategy, None
    if isinstance(strategy, (ModelParallelStrategy, DeepSpeedStrategy)):
        reason = "wants to lay out the model itself, and per-example gradients need it whole"
    elif isinstance(strategy.launcher, _MultiProcessingLauncher):
        reason = "ends its processes with each launch, and what they computed with them"
    if reason is not None:
        raise ValueError(
            f"{type(strategy).__name__} {reason}. Give attribute() a Trainer(strategy='ddp') or "
            "strategy='fsdp' in a script, or one with devices=1. The trajectory may have been "
            "recorded with any strategy."
        )


def written_by_first(trajectory: Trajectory) -> Trajectory:
    """``trajectory``, to whose folder only the first process adds curvature and features: the
    others keep what they have found to themselves."""
    curvature, features = trajectory.curvature, trajectory.features
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    if rank == 0 or not isinstance(curvature, TensorCache):
        return trajectory
    return replace(trajectory, curvature=ChainMap({}, curvature), features=ChainMap({}, features))
