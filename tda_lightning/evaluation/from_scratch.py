"""Retraining from scratch on part of the training set: the truth about the algorithm, not one run.

Examples that are left out are not there at all: the training set is smaller, batches are filled
with the others, and the same number of epochs has fewer steps. Initial weights, the order of
batches and everything else random come from a fresh seed. For the difference from weight 0 in the
recorded run see :mod:`tda_lightning.evaluation.retraining` and
:func:`~tda_lightning.evaluation.as_removal`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from tda_lightning.evaluation.retraining import require_finite
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.fresh_training import FreshTraining
from tda_lightning.replay.run import State
from tda_lightning.runtime.random_states import unchanged_randomness


def retrain_from_scratch(make: Callable[[int], FreshTraining], kept: Tensor, seed: int) -> State:
    """Train on the examples ``kept`` only.

    Args:
        make: makes everything that one training run needs from a seed. It may seed the global
            generators, which are restored afterwards.
        kept: bool [train].
        seed: passed to ``make``.

    Returns:
        Parameters and buffers after training, on the CPU, by name.

    Raises:
        UnsupportedTrainingError: examples cannot be left out of this training loader.
        NonFiniteError: training diverged.
    """
    with unchanged_randomness():
        training = make(seed)
        data = training.data
        full_loader = data.train_dataloader
        # On the instance, so that the user's class is not changed.
        data.train_dataloader = lambda: smaller_loader(full_loader(), kept)
        training.trainer.fit(training.module, datamodule=data)
    module = training.module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    # Trainer, module and data reference each other: without this, every run would stay in memory.
    del training, data, module, tensors
    gc.collect()
    require_finite(state)
    return state


def smaller_loader(loader: Any, kept: Tensor) -> DataLoader[Any]:
    """A loader like ``loader`` over the examples ``kept``, bool [train], only.

    Raises:
        UnsupportedTrainingError: ``loader`` is not a ``DataLoader`` over a map-style data set with
            a batch size and one of the standard samplers.
        ValueError: its data set has another length than ``kept``.
    """
    standard = (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_size is not None
        and type(loader.sampler) in (RandomSampler, SequentialSampler)
    )
    if not standard:
        raise UnsupportedTrainingError(
            "Retraining without some examples needs a DataLoader over a map-style data set, with a "
            f"batch size and without a custom sampler, got {type(loader).__name__}. Judge by "
            "protocol=single_run, which replays the recorded batches."
        )
    if len(loader.dataset) != len(kept):  # type: ignore[arg-type]
        raise ValueError(
            f"kept must have one entry for each of {len(loader.dataset)} "  # type: ignore[arg-type]
            f"training examples, got {len(kept)}."
        )
    subset = Subset(loader.dataset, kept.nonzero().flatten().tolist())
    return DataLoader(
        subset,
        batch_size=loader.batch_size,
        shuffle=isinstance(loader.sampler, RandomSampler),
        generator=loader.generator,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers,
    )
