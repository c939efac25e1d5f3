"""What exact unrolling cannot do, each by its name."""

from __future__ import annotations

from collections.abc import Collection

from tda_lightning.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tda_lightning.passes import Context
from tda_lightning.replay import Replay


def require_exact(replay: Replay, context: Context, relabelled: Collection[int]) -> None:
    """Check that the run can be replayed and differentiated.

    Raises:
        UnsupportedTrainingError: it cannot, and why.
        TrajectoryMismatchError: the module computes in another precision than the run.
        ValueError: the examples to be relabelled, or the task, do not fit.
    """
    replay.check()
    trajectory, task = context.trajectory, context.task
    if task.layers is not None:
        raise UnsupportedTrainingError(
            f"task.layers={list(task.layers)} restricts attribution to some layers, and exact "
            "unrolling follows every trained parameter: what one layer learns changes the others. "
            "Give a task without layers."
        )
    if not task.separable:
        raise UnsupportedTrainingError(
            "The losses of single examples are not known, so none can be weighted: "
            f"{' '.join(task.notes)}"
        )
    named = dict(context.module.named_parameters())
    for name, fact in trajectory.facts.parameters.items():
        own = str(named[name].dtype).removeprefix("torch.")
        if own != fact.dtype:
            raise TrajectoryMismatchError(
                f"{name} was trained in {fact.dtype}, and the module holds it in {own}: replayed "
                "in another precision, the run goes elsewhere. Convert the module, for example "
                "module.double()."
            )
    for index in relabelled:
        if not 0 <= index < context.num_train:
            raise ValueError(
                f"relabel names the training example {index}; expected 0 to "
                f"{context.num_train - 1}."
            )
