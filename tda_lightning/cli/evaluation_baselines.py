"""Scores that cost next to nothing, for ``tda evaluate`` to show beside those that it judges."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from omegaconf import DictConfig

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.retraining import RecordedRun
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import TracIn
from tda_lightning.evaluation import (
    BASELINES,
    OF_TEXT,
    activation_cosine,
    bm25,
    last_checkpoint,
    last_layer_cosine,
    random_scores,
    self_loss,
    token_numbers,
)
from tda_lightning.records.data_module import Textual
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.scores import Scores
from tda_lightning.tasks import LanguageModelingTask


def check_baselines(config: DictConfig) -> None:
    """Refuse baselines that there are not.

    Raises:
        ValueError: lists those that there are.
    """
    for name in config.baselines or []:
        if name not in BASELINES:
            raise ValueError(f"baselines must be among {', '.join(BASELINES)}, got {name}.")


def baselines_of(run: RecordedRun) -> list[str]:
    """Those asked for; where nothing is said, those that suit the data."""
    if run.config.baselines is not None:
        return list(run.config.baselines)
    textual = isinstance(run.data, Textual) or isinstance(run.task, LanguageModelingTask)
    return [name for name in BASELINES if textual or name not in OF_TEXT]


def baseline(name: str, run: RecordedRun) -> Scores:
    """Scores that cost next to nothing.

    Raises:
        UnsupportedTrainingError, ValueError: this model or these data have no such scores.
    """
    train, query, size = run.train, run.queries, run.config.batch_size
    compared = (run.module, run.task, run.end, train, query, size)
    if name == "random":
        return random_scores(len(query), len(train), run.config.seed)
    if name == "self_loss":
        return self_loss(run.module, run.task, run.end, train, len(query), size)
    if name == "last_layer":
        return last_layer_cosine(*compared)
    if name == "activations":
        return activation_cosine(*compared)
    if name == "bm25" and isinstance(run.data, Textual):
        return bm25(run.data.documents("train"), run.data.documents("query"))
    if name == "bm25":
        return bm25(token_numbers(train), token_numbers(query))
    last = last_checkpoint(run.trajectory)
    attribution = AttributionModule(run.module, last, TracIn(), run.task)
    scores = attribution.attribute(
        train, query, size, trainer=silent_trainer(), self_influence=False
    )
    return replace(scores, provenance=cast(Provenance, {**scores.provenance, "estimator": name}))
