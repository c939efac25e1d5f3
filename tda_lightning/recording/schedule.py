"""Steps after which a checkpoint is kept."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def spread(trainer: Trainer, count: int, *, required: bool) -> frozenset[int]:
    """Steps floor(i T / count), i = 1 to count, of the T steps that ``trainer`` will make.

    Args:
        trainer: its training loader must have been made.
        count: number of checkpoints; fewer come out when T is smaller.
        required: whether it is an error that T is not known.

    Raises:
        ValueError: T is required and not known.
    """
    try:
        total = trainer.estimated_stepping_batches
    except MisconfigurationException:
        total = math.inf  # an accumulation that changes between epochs
    if 0 < total < math.inf:
        return frozenset(i * int(total) // count for i in range(1, count + 1)) - {0}
    if required:
        raise ValueError(
            f"num_checkpoints={count} needs to know the number of optimizer steps beforehand, and "
            "the trainer cannot tell it. Pass every_n_steps or every_n_epochs, or set "
            "Trainer(max_steps=...)."
        )
    return frozenset()
