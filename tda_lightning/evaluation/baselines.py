"""Scores that cost next to nothing, for an estimator to beat.

They are not in the unit of the measurement, so only their ranks are judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.estimators.features import read_every_linear_input, read_features
from tda_lightning.evaluation.retraining import losses, of_each_batch
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import AttributionTask, as_task

BASELINES = ("random", "self_loss", "last_layer", "gradient_dot", "bm25", "activations")
OF_TEXT = ("bm25", "activations")


def random_scores(num_queries: int, num_train: int, seed: int = 0) -> Scores:
    """Normally distributed numbers, to show what chance looks like."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_queries, num_train, generator=generator)
    own = torch.randn(num_train, generator=generator)
    return Scores(values, self_influence=own, provenance={"estimator": "random"})


def self_loss(
    module: nn.Module,
    task: AttributionTask | None,
    state: Mapping[str, Tensor],
    dataset: object,
    num_queries: int,
    batch_size: int = 256,
) -> Scores:
    """The training examples' own losses under ``state``, the same for every query.

    This is the usual baseline for finding wrong labels.
    """
    own = losses(module, task, state, dataset, batch_size).float().cpu()
    values = own.expand(num_queries, -1).clone()
    return Scores(values, self_influence=own, provenance={"estimator": "self_loss"})


def last_layer_cosine(
    module: nn.Module,
    task: AttributionTask | None,
    state: Mapping[str, Tensor],
    dataset: object,
    queries: object,
    batch_size: int = 256,
) -> Scores:
    """Cosine similarity of the inputs of the last linear layer, averaged over a sequence.

    Raises:
        ValueError: no linear layer is called.
    """
    training = ExampleSource.of(dataset, batch_size, "training")
    asked = training.others(queries, batch_size, "query")
    query, train = (_features(module, task, state, source) for source in (asked, training))
    values = F.normalize(query, dim=1) @ F.normalize(train, dim=1).T
    return Scores(values, provenance={"estimator": "last_layer"})


def activation_cosine(
    module: nn.Module,
    task: AttributionTask | None,
    state: Mapping[str, Tensor],
    dataset: object,
    queries: object,
    batch_size: int = 256,
) -> Scores:
    """Cosine similarity of the inputs of all linear layers: the mean over layers of the cosine in
    each, with inputs averaged over the positions of a sequence, padding included.

    Raises:
        ValueError: no linear layer is called.
    """
    training = ExampleSource.of(dataset, batch_size, "training")
    asked = training.others(queries, batch_size, "query")
    query, train = (_activations(module, task, state, source) for source in (asked, training))
    return Scores(query @ train.T, provenance={"estimator": "activations"})


def last_checkpoint(trajectory: Trajectory) -> Trajectory:
    """The run with only its first and last checkpoints: TracIn on it gives gradient dot products at
    the end, times the sum of the rates."""
    ends = {step: trajectory.checkpoints[step] for step in (0, trajectory.last_step)}
    return replace(trajectory, checkpoints=ends)


def _features(
    module: nn.Module,
    task: AttributionTask | None,
    state: Mapping[str, Tensor],
    source: ExampleSource,
) -> Tensor:
    """Inputs of the last linear layer called, float32 [example, feature]."""
    chosen = as_task(task)

    def read(batch: object) -> Tensor:
        features, _ = read_features(module, None, lambda: len(chosen.measurement(module, batch)))
        return features.cpu()

    return torch.cat(of_each_batch(read, module, state, source))


def _activations(
    module: nn.Module,
    task: AttributionTask | None,
    state: Mapping[str, Tensor],
    source: ExampleSource,
) -> Tensor:
    """Inputs of all linear layers, each of length 1, together of length 1: [example, feature]."""
    chosen = as_task(task)

    def read(batch: object) -> Tensor:
        layers = read_every_linear_input(module, lambda: len(chosen.measurement(module, batch)))
        rows = [F.normalize(layers[name], dim=1) for name in sorted(layers)]
        return torch.cat(rows, 1).cpu() / len(rows) ** 0.5

    return torch.cat(of_each_batch(read, module, state, source))
