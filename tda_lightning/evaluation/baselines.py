"""Scores that cost almost nothing: what an estimator has to beat.

Their unit is their own, so they are judged by rank alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.estimators.features import read_features
from tda_lightning.evaluation.retraining import losses, of_each_batch
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import AttributionTask, as_task

BASELINES = ("random", "self_loss", "last_layer", "gradient_dot")


def random_scores(num_queries: int, num_train: int, seed: int = 0) -> Scores:
    """Normal numbers that know nothing: what chance looks like."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_queries, num_train, generator=generator)
    own = torch.randn(num_train, generator=generator)
    return Scores(values, self_influence=own, provenance={"estimator": "random"})


def self_loss(
    module: nn.Module,
    task: AttributionTask | None,
    state: Mapping[str, Tensor],
    dataset: Any,
    num_queries: int,
    batch_size: int = 256,
) -> Scores:
    """The training examples' own losses under ``state``, the same for every query.

    The usual baseline for finding wrong labels; to queries it says nothing of their own.
    """
    found = losses(module, task, state, dataset, batch_size).float().cpu()
    values = found.expand(num_queries, -1).clone()
    return Scores(values, self_influence=found, provenance={"estimator": "self_loss"})


def last_layer_cosine(
    module: nn.Module,
    task: AttributionTask | None,
    state: Mapping[str, Tensor],
    dataset: Any,
    queries: Any,
    batch_size: int = 256,
) -> Scores:
    """Cosine of the inputs of the last linear layer, those of a sequence averaged.

    Raises:
        ValueError: no linear layer is called.
    """
    sides = (queries, "query"), (dataset, "training")
    query, train = (
        _features(module, task, state, ExampleSource.of(data, batch_size, what))
        for data, what in sides
    )
    values = F.normalize(query, dim=1) @ F.normalize(train, dim=1).T
    return Scores(values, provenance={"estimator": "last_layer"})


def last_checkpoint(trajectory: Trajectory) -> Trajectory:
    """The run with its last checkpoint alone: TracIn over it is the gradient dot product, times
    the sum of the rates."""
    last = trajectory.last_step
    kept = {step: trajectory.checkpoints[step] for step in (0, last)}
    return replace(trajectory, checkpoints=kept)


def _features(
    module: nn.Module, task: AttributionTask | None, state: Mapping[str, Tensor], source: Any
) -> Tensor:
    """Inputs of the last linear layer called, float32 [example, feature]."""
    chosen = as_task(task)

    def read(batch: Any) -> Tensor:
        found, _ = read_features(module, None, lambda: len(chosen.measurement(module, batch)))
        return found.cpu()

    return torch.cat(of_each_batch(read, module, state, source))
