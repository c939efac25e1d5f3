"""Stage-1 examples scored by every estimator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import ConcatDataset

from experiments.two_stages.setting import Data, network
from experiments.two_stages.truth import TASK
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import (
    InfluenceFunction,
    MultiStageInfluence,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.evaluation.baselines import last_checkpoint, last_layer_cosine, random_scores

DAMPINGS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # times the layer's mean eigenvalue
DEFAULT_DAMPING = 0.1
HALF = 0.5  # as many of the examples stay


def estimators(runs: Sequence[Trajectory], data: Data) -> dict[str, Callable[[], Tensor]]:
    """What makes the scores [query, train of stage 1] of each: from the recorded runs alone,
    curvature included."""
    queries, together = data.queries, ConcatDataset(data.stages)
    end = runs[1].checkpoints[runs[1].last_step].parameters

    def through_stages(estimator: Any, keep: float = 1) -> Tensor:
        return attribute(estimator, list(runs), list(data.stages), keep)

    def attribute(estimator: Any, run: Any, train: Any, keep: float = 1) -> Tensor:
        fresh = [replace(one, curvature={}) for one in (run if isinstance(run, list) else [run])]
        module = AttributionModule(network(1), fresh, estimator, TASK)
        quiet = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        found = module.attribute(train, queries, trainer=quiet, self_influence=False, keep=keep)
        return found.values[:, : len(data.stages[0])]

    def influence(damping: float, combined: bool) -> Tensor:
        estimator = InfluenceFunction(relative_damping=damping)
        if combined:
            return attribute(estimator, as_if_on(together, runs[1]), together)
        return attribute(estimator, as_if_on(data.stages[0], runs[1]), data.stages[0])

    def along_both() -> Tensor:
        own = attribute(TracIn(), runs[0], data.stages[0])
        return own + attribute(TracIn(), as_if_on(data.stages[0], runs[1]), data.stages[0])

    def dot() -> Tensor:
        final = last_checkpoint(as_if_on(data.stages[0], runs[1]))
        return attribute(TracIn(), final, data.stages[0])

    found: dict[str, Callable[[], Tensor]] = {
        "source": lambda: through_stages(Source()),
        "source_blocks": lambda: through_stages(Source(leading_directions=0)),
        "recorded": lambda: through_stages(Source(order="recorded")),
        "recorded_blocks": lambda: through_stages(Source(order="recorded", leading_directions=0)),
    }
    for damping in DAMPINGS:
        found[f"multi_stage {damping:g}"] = lambda d=damping: through_stages(
            MultiStageInfluence(relative_damping=d)
        )
    found |= {
        "source at half": lambda: through_stages(Source(), HALF),
        "source_blocks at half": lambda: through_stages(Source(leading_directions=0), HALF),
        "recorded at half": lambda: through_stages(Source(order="recorded"), HALF),
        "unrolled": lambda: through_stages(Unrolled()),
        "unrolled at half": lambda: through_stages(Unrolled(), HALF),
    }
    for kind, combined in (("influence", False), ("influence_both", True)):
        for damping in DAMPINGS:
            found[f"{kind} {damping:g}"] = lambda d=damping, c=combined: influence(d, c)
    return found | {
        "tracin": lambda: attribute(TracIn(), runs[0], data.stages[0]),
        "tracin_both": along_both,
        "gradient_dot": dot,
        "last_layer": lambda: (
            last_layer_cosine(network(1), TASK, end, data.stages[0], queries).values
        ),
        "random": lambda: random_scores(len(queries), len(data.stages[0])).values,
    }


def as_if_on(data: Any, run: Trajectory) -> Trajectory:
    """The run as if it had been trained on ``data``: what an estimator that knows nothing of stages
    is given, the final model with the examples in question, all used evenly."""
    steps = replace(
        run.steps,
        examples=run.steps.examples[:0],
        example_offsets=torch.zeros_like(run.steps.example_offsets),
    )
    facts = replace(run.facts, num_examples=len(data), fingerprint=None)
    return replace(run, facts=facts, steps=steps)
