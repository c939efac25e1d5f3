"""The task of a weighted replay: it must know what each example contributes to a batch's loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tda_lightning.records.errors import TrajectoryMismatchError, UnseenBatchError
from tda_lightning.replay.run import Replay, initial
from tda_lightning.runtime.module_state import borrowed, load_tensors
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.tasks import AttributionTask, noise_of, seeded_examples

Result = TypeVar("Result")


def prepared(replay: Replay) -> AttributionTask:
    """A copy of the task, prepared on the first batch: it must know what each example contributes
    to a batch's loss."""
    task = copy.deepcopy(replay.task)
    task.training_batch_size = replay.trajectory.batch_size
    examples = replay.trajectory.steps.batches(0)[0]
    with borrowed(replay.module), unchanged_randomness():
        load_tensors(replay.module, initial(replay.trajectory))
        replay.module.eval()
        replay.see(0, 0)
        batch = replay.fetch(examples)

        def loss(part: object, chosen: Tensor) -> Tensor:
            with seeded_examples(0, chosen):
                return task.train_loss(replay.module, part)

        noise_of(loss, batch, examples, lambda: (replay.fetch(examples[:-1]), examples[:-1]))
        with seeded_examples(0, examples):
            task.prepare(replay.module, batch)
    return task


def again_where_unseen(replay: Replay, run: Callable[[], Result]) -> Result:
    """Once more where a batch is made otherwise than the one that the task was prepared on."""
    try:
        return run()
    except UnseenBatchError:
        replay.task = prepared(replay)
        return run()


def require_task_loss(step: int, task: float, trained: float, dtype: torch.dtype, who: str) -> None:
    """Refuse a task whose losses do not make up the loss as trained.

    Args:
        step: of whose batches these are the losses.
        task: by the task.
        trained: by the training step.
        dtype: of the model.
        who: needs the very loss, in words.

    Raises:
        TrajectoryMismatchError: they do not.
    """
    # Models of transformers compute their losses in float32, whatever they are in themselves.
    exact = dtype == torch.float64 and trained != float(np.float32(trained))
    tolerance = 1e-8 if exact else 1e-3
    if not abs(task - trained) <= tolerance * max(1.0, abs(trained)):
        raise TrajectoryMismatchError(
            f"The task's losses do not add up to the loss as trained: for a batch of step {step} "
            f"{task:.6g}, expected {trained:.6g}. {who} needs the very loss. With "
            "task=None it is taken from the module's own training_step, with all that is added or "
            "weighted there; otherwise check the task's reduction and weights."
        )
