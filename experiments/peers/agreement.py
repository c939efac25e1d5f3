"""Whether the libraries compute what we do, where both can: correlation and slope of the scores.

python -m experiments.peers.agreement RUN [--data-root FOLDER]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.peers.captum import has_batch_gradients, tracin
from experiments.peers.kronfluence import Influence, left_out
from experiments.peers.recorded import Run, open_run
from experiments.peers.trak import Trak, projection_dimension
from tda_lightning import AttributionModule
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import InfluenceFunction, TracIn
from tda_lightning.tasks import AttributionTask


class EmpiricalTask(AttributionTask):
    """A task's loss without sampled labels: curvature is the empirical Fisher, nothing is random.

    Args:
        task: has the loss.
        layers: names of the parameters that count.
    """

    def __init__(self, task: AttributionTask, layers: list[str]) -> None:
        self.task = task
        self.layers = layers

    def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
        return self.task.train_loss(module, batch)


def ours(run: Run, estimator: Any, task: AttributionTask, batch_size: int) -> Tensor:
    attribution = AttributionModule(run.module, run.trajectory, estimator, task)
    return attribution.attribute(
        run.train, run.query, batch_size, trainer=silent_trainer(), self_influence=False
    ).values


def agreement(name: str, found: Tensor, theirs: Tensor) -> str:
    """A row of the table; the slope is ours over theirs."""
    a, b = found.double().cpu(), theirs.double().cpu()
    rows = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(a, b, strict=True)]
    every = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
    slope = float((a * b).sum() / (b * b).sum())
    return f"| {name} | {every:.6f} | {min(rows):.6f} | {slope:.6f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-root")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)

    def opened() -> Run:
        return open_run(arguments.run, arguments.data_root, "cpu")

    run, size = opened(), arguments.batch_size
    skipped = set(left_out(run.module))
    layers = [name for name, _ in run.module.named_parameters() if name not in skipped]
    damping = 0.01
    decay = float(run.trajectory.steps.hyperparameters["weight_decay"].max())
    print(
        "| scores against | correlation of all | lowest of a query | slope |",
        "|---|---|---|---|",
        sep="\n",
    )

    mine = ours(run, TracIn(), run.task, size)
    theirs = tracin(run, 8, has_batch_gradients(run.module))
    print(agreement("captum, TracInCP", mine, theirs))

    influence = InfluenceFunction(curvature="ekfac", damping=damping, statistics="fitted")
    mine = ours(run, influence, EmpiricalTask(run.task, layers), size)
    same_layers = replace(run.task, layers=layers)  # type: ignore[type-var]
    sampled = ours(run, InfluenceFunction(curvature="ekfac"), same_layers, size)
    with tempfile.TemporaryDirectory() as folder:
        steps = run.steps[-1:]
        dimension = projection_dimension(None, run.num_train)
        trak = Trak(run, steps, Path(folder), dimension, size, seed=0)
        trak.project()
        print(agreement("traker, TRAK with damping 0.1", sampled, trak.score(0.1)[0]))
    for empirical, scores in ((True, mine), (False, sampled)):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            method = Influence(opened(), Path(folder), size, empirical)
            method.fit()
            # Ours adds the weight decay to the curvature, kronfluence does not.
            theirs = method.score(damping + decay if empirical else None)
        kind = "empirical Fisher" if empirical else "sampled labels, default damping"
        print(agreement(f"kronfluence, EK-FAC, {kind}", scores, theirs))


if __name__ == "__main__":
    main()
