"""What the recorder can record, checked before and while it does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from tda_lightning.optimizers import consequences, optimizer_name
from tda_lightning.records.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tda_lightning.records.trajectory import Facts
from tda_lightning.runtime.processes import is_distributed
from tda_lightning.store.fingerprints import LENGTH, compare_fingerprints


def require_supported(trainer: Trainer, module: LightningModule) -> None:
    """Check what is known before optimizers and loaders exist."""
    if not module.automatic_optimization:
        raise UnsupportedTrainingError(
            "TrajectoryRecorder records automatic optimization with one optimizer, got "
            "automatic_optimization=False (manual optimization). Let Lightning step the "
            "optimizer, or train without the recorder."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise UnsupportedTrainingError(
            "training_step takes a dataloader_iter and fetches batches itself, so they cannot "
            "be told apart; expected training_step(self, batch, batch_idx)."
        )
    require_recordable(trainer)


def require_recordable(trainer: Trainer) -> None:
    """Check that the strategy trains as one process with more accumulation would.

    Raises:
        UnsupportedTrainingError: it does not, or its processes cannot be asked.
    """
    strategy = trainer.strategy
    name, reason = type(strategy).__name__, None
    if isinstance(strategy, (DeepSpeedStrategy, XLAStrategy)):
        reason = "it keeps gradients and optimizer where a callback cannot read them"
    elif isinstance(strategy, ModelParallelStrategy):
        if strategy.device_mesh["tensor_parallel"].size() > 1:
            reason = "with tensor_parallel_size > 1 several processes share one batch"
    elif isinstance(strategy, DDPStrategy) and strategy._model_averaging_period is not None:
        reason = "with model_averaging_period its processes take steps of their own"
    elif trainer.world_size > 1 and not is_distributed():
        reason = f"its {trainer.world_size} processes are not those of torch.distributed"
    if reason is not None:
        raise UnsupportedTrainingError(
            f"TrajectoryRecorder cannot record {name}: {reason}. Use Trainer(strategy='ddp'), "
            "strategy='fsdp' or one device."
        )


def require_one_optimizer(optimizers: Sequence[Optimizer]) -> None:
    """Check that there is one optimizer.

    Raises:
        UnsupportedTrainingError: there are several, or none.
    """
    if len(optimizers) != 1:
        raise UnsupportedTrainingError(
            f"TrajectoryRecorder records one optimizer, got {len(optimizers)} optimizers "
            "from configure_optimizers(). Use one, with a parameter group for each setting."
        )


def warn_without_formula(optimizer: Optimizer) -> None:
    """Warn about an optimizer that some estimators will refuse."""
    name = optimizer_name(optimizer)
    if text := consequences(name):
        rank_zero_warn(f"TrajectoryRecorder records this run by {name} all the same. {text}")


def indices_ended(reason: str) -> UnsupportedTrainingError:
    """Earlier batches had their indices, this one has not."""
    return UnsupportedTrainingError(
        f"Example indices ended in mid-training: {reason}. Expected one kind of batch "
        "throughout; use a sampler of integer positions for all of them."
    )


def require_same_examples(trainer: Trainer, facts: Facts, first: Any) -> Any:
    """The training data set of the epoch that starts, checked where it is another object.

    Raises:
        UnsupportedTrainingError: an index would stand for another example than before.
    """
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if dataset is first or facts.num_examples is None:
        return first
    try:
        compare_fingerprints(facts.fingerprint or {LENGTH: str(facts.num_examples)}, dataset)
    except TrajectoryMismatchError as error:
        raise UnsupportedTrainingError(
            f"The training data set of epoch {trainer.current_epoch} is not the one that training "
            f"began with: {error} Expected one data set whose indices mean the same in every "
            "epoch. Vary the sampler instead, or record each part as a fit of its own."
        ) from error
    return dataset


def training_loader(trainer: Trainer) -> Any:
    """The one training loader.

    Raises:
        UnsupportedTrainingError: there are several, or its batches come out of order.
    """
    loader = trainer.train_dataloader
    if isinstance(loader, (CombinedLoader, list, tuple, Mapping)):
        flat = loader.flattened if isinstance(loader, CombinedLoader) else loader
        raise UnsupportedTrainingError(
            f"Training uses a collection of {len(flat)} loaders ({type(loader).__name__}), "
            "expected a single DataLoader, so that each batch has one list of example indices. "
            "Join the data sets, for instance with torch.utils.data.ConcatDataset."
        )
    in_order = getattr(loader, "in_order", True)  # torch before 2.6 knows no other way
    if isinstance(loader, DataLoader) and loader.num_workers and not in_order:
        raise UnsupportedTrainingError(
            "The training DataLoader has in_order=False: its batches arrive in another order "
            "than their indices are drawn, so they cannot be told apart. Set in_order=True."
        )
    return loader
