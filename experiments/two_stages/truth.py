"""What the queries' losses are after both stages are trained again without some of stage 1."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.descent import descend, fresh_batches
from experiments.two_stages.setting import BATCH_SIZE, EPOCHS, RATES, Data, network
from tda_lightning import Trajectory
from tda_lightning.evaluation import (
    GroundTruth,
    draw_seeds,
    draw_subsets,
    measure,
    retrain,
    retrain_each,
    truth_configuration,
)
from tda_lightning.records.ground_truth import RECORDED_SEED, Protocol
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.store.ground_truth_file import read_ground_truth, write_ground_truth
from tda_lightning.tasks import ClassificationTask

TASK = ClassificationTask()
SUBSETS, VALIDATION = 100, 25  # to judge by; and, drawn apart, to choose dampings by
FRACTION = 0.5  # of stage 1 that a subset keeps
SEEDS = {"single_run": 1, "algorithm": 2}
TOGETHER = 25  # replays of stage 1 at once


def ground_truth(
    protocol: Protocol,
    runs: Sequence[Trajectory],
    data: Data,
    path: Path,
    fraction: float = FRACTION,
    validation: int = VALIDATION,
) -> GroundTruth:
    """From the file at ``path`` as far as it goes, the rest retrained and kept there."""
    num_train = len(data.stages[0])
    subsets = draw_subsets(num_train, fraction, SUBSETS)
    if validation:
        subsets = torch.cat([subsets, draw_subsets(num_train, fraction, validation, 1)])
    seeds = draw_seeds(len(subsets), SEEDS[protocol])
    if protocol == "single_run":
        seeds = torch.full_like(seeds, RECORDED_SEED)
    end = runs[1].checkpoints[runs[1].last_step].parameters
    settings = None
    if protocol == "algorithm":
        settings = {"epochs": EPOCHS, "rates": RATES, "batch_size": BATCH_SIZE}
    truth = GroundTruth.unmeasured(
        protocol,
        subsets,
        seeds,
        measure(network(1), TASK, end, data.queries),
        {
            f"stage {number}": truth_configuration(run, network(1), TASK, data.queries, settings)
            for number, run in enumerate(runs, start=1)
        },
    )
    if path.exists():
        truth = truth.continuing(read_ground_truth(path))
    missing = truth.missing
    if not missing:
        return truth
    kept = truth.subsets[[row for row, _ in missing]]
    if protocol == "single_run":
        states = replayed(runs, data, kept.float())
    else:
        states = trained_anew(data, kept, [int(truth.seeds[pair]) for pair in missing])
    with SlowProgress(f"Retraining, {protocol}", len(missing)) as progress:
        began = time.monotonic()
        for (row, column), state in zip(missing, states, strict=True):
            outcome = measure(network(1), TASK, state, data.queries)
            truth = truth.with_outcome(row, column, outcome, time.monotonic() - began)
            write_ground_truth(truth, path)
            progress.advance()
            began = time.monotonic()
    return truth


def replayed(
    runs: Sequence[Trajectory], data: Data, weights: Tensor, together: int = TOGETHER
) -> Iterator[dict[str, Tensor]]:
    """Ends of both recorded runs under ``weights`` [subset, train of stage 1]: stage 2 with its own
    batches, from where stage 1 ends."""
    first, second = network(0), network(1)
    whole = torch.ones(len(data.stages[1]))
    for end in retrain_each(runs[0], first, TASK, data.stages[0], weights, together=together):
        yield retrain(started(runs[1], end), second, TASK, data.stages[1], whole)


def started(run: Trajectory, parameters: Mapping[str, Tensor]) -> Trajectory:
    """The run from other initial weights."""
    begin = replace(run.checkpoints[0], parameters=parameters)
    return replace(run, checkpoints={**run.checkpoints, 0: begin})


def trained_anew(data: Data, subsets: Tensor, seeds: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Ends of training both stages with fresh seeds, the others of stage 1 really not there."""
    every = torch.arange(len(data.stages[1]))
    for kept, seed in zip(subsets, seeds, strict=True):
        with unchanged_randomness():
            torch.manual_seed(seed)
            first, second = network(0), network(1)
            examples = kept.nonzero()[:, 0]
            descend(first, data.stages[0], fresh_batches(examples, EPOCHS[0], BATCH_SIZE))
            second.load_state_dict(first.state_dict())
            descend(second, data.stages[1], fresh_batches(every, EPOCHS[1], BATCH_SIZE))
        yield dict(second.state_dict())
