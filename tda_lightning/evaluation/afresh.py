"""Train anew on part of the training set: the truth about the algorithm, not about one run.

Examples left out are not there at all: the training set is smaller, batches are full of the
others, and a run of as many epochs has fewer steps. Initial weights, the order of the batches and
whatever else is drawn come from a fresh seed. How that differs from weight 0 in the recorded run:
:mod:`tda_lightning.evaluation.retraining` and :func:`~tda_lightning.evaluation.as_removal`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from tda_lightning.evaluation.retraining import require_finite
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.replay.run import State
from tda_lightning.runtime.random_states import unchanged_randomness


@dataclass(frozen=True)
class FreshTraining:
    """What one training takes, made for one seed and used once.

    Attributes:
        trainer: a Lightning ``Trainer``, new: one that has been fitted does not begin again.
        module: with initial weights of its seed.
        data: a data module whose training loader draws its order from the seed.
    """

    trainer: Any
    module: nn.Module
    data: Any


def retrain_afresh(make: Callable[[int], FreshTraining], kept: Tensor, seed: int) -> State:
    """Train on the examples ``kept`` alone.

    Args:
        make: from a seed, everything that a training takes. It may seed the global generators,
            which are left as they were.
        kept: bool [train].
        seed: given to ``make``.

    Returns:
        Parameters and buffers after training, on the CPU, by name.

    Raises:
        UnsupportedTrainingError: the training loader is none whose examples can be taken away.
        NonFiniteError: training diverged.
    """
    with unchanged_randomness():
        training = make(seed)
        data = training.data
        given = data.train_dataloader
        # On the instance: the user's own class stays as it is.
        data.train_dataloader = lambda: smaller(given(), kept)
        training.trainer.fit(training.module, datamodule=data)
    module = training.module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    # A trainer, its module and its data hold each other: of many trainings all would stay.
    del training, data, module, tensors
    gc.collect()
    require_finite(state)
    return state


def smaller(loader: Any, kept: Tensor) -> DataLoader[Any]:
    """A loader like ``loader`` of the examples ``kept``, bool [train], alone.

    Raises:
        UnsupportedTrainingError: ``loader`` is no ``DataLoader`` of a map-style data set with a
            batch size of its own and the usual samplers.
        ValueError: its data set has another length than ``kept``.
    """
    usual = (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_size is not None
        and type(loader.sampler) in (RandomSampler, SequentialSampler)
    )
    if not usual:
        raise UnsupportedTrainingError(
            "Training anew without some examples needs a DataLoader over a map-style data set with "
            f"a batch size and no sampler of its own, got {type(loader).__name__}. Judge by "
            "protocol=single_run, which replays the recorded batches."
        )
    if len(loader.dataset) != len(kept):  # type: ignore[arg-type]
        raise ValueError(
            f"kept must say of each of {len(loader.dataset)} "  # type: ignore[arg-type]
            f"training examples whether it stays, got {len(kept)}."
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
