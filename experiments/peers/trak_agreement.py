"""Ours and traker's TRAK over seeds of the projection: as alike as two seeds of traker's own.

python -m experiments.peers.trak_agreement RUN [RUN ...] [--dimension K] [--seeds 4]

Several runs are one ensemble. Correlations of the scores of single queries, on average.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from experiments.peers.recorded import Run, open_run
from experiments.peers.trak import Trak, projection_dimension
from tda_lightning import AttributionModule, Ensemble
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import TRAK


@dataclasses.dataclass(frozen=True)
class Members(Run):
    """Several runs in the place of one run's checkpoints, by their numbers."""

    runs: tuple[Run, ...] = ()

    def load(self, step: int) -> None:
        """The last weights of run ``step``; of the first where there is none."""
        trajectory = self.runs[step if step < len(self.runs) else 0].trajectory
        state = trajectory.checkpoints[trajectory.last_step]
        self.module.load_state_dict({**state.parameters, **state.buffers})


def theirs(members: Members, dimension: int, batch_size: int, seed: int) -> Tensor:
    """traker's scores [query, train], each query's times the derivative of its loss by the output
    (in the first run; a factor, of which only the sign matters here)."""
    numbers = list(range(len(members.runs)))
    with tempfile.TemporaryDirectory() as folder:
        trak = Trak(members, numbers, Path(folder), dimension, batch_size, seed)
        trak.project()
        return trak.score(0.0)[0].double()


def ours(members: Members, dimension: int, batch_size: int, seed: int) -> Tensor:
    """Our scores."""
    trajectories = [run.trajectory for run in members.runs]
    attribution = AttributionModule(
        members.module,
        Ensemble(trajectories) if len(trajectories) > 1 else trajectories[0],
        TRAK(projection_dimension=dimension, seed=seed),
        members.task,
    )
    return attribution.attribute(
        members.train, members.query, batch_size, trainer=silent_trainer(), self_influence=False
    ).values.double()


def correlation(first: Tensor, second: Tensor) -> float:
    """Mean over queries."""
    pairs = zip(first, second, strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean())


def described(pairs: Iterable[tuple[Tensor, Tensor]]) -> str:
    """Mean and range of the correlations of some pairs."""
    found = torch.tensor([correlation(*pair) for pair in pairs])
    return f"{float(found.mean()):.4f} ({float(found.min()):.4f} to {float(found.max()):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data-root")
    parser.add_argument("--dimension", type=int, help="by default as in experiments.peers.trak")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    runs = tuple(open_run(run, arguments.data_root, "cpu") for run in arguments.runs)
    fields = {field.name: getattr(runs[0], field.name) for field in dataclasses.fields(Run)}
    members = Members(**fields, runs=runs)
    dimension = projection_dimension(arguments.dimension, members.num_train)
    settings = (dimension, arguments.batch_size)
    # Members have seeds of their own: ours the next ones, traker's by their numbers.
    seeds = [100 * number for number in range(arguments.seeds)]
    own = [ours(members, *settings, seed) for seed in seeds]
    other = [theirs(members, *settings, seed) for seed in seeds]
    print(
        f"{len(runs)} runs, {members.num_train} examples, {members.num_query} queries, "
        f"{dimension} dimensions, {len(seeds)} seeds",
        f"traker, between its seeds: {described(itertools.combinations(other, 2))}",
        f"ours, between its seeds:   {described(itertools.combinations(own, 2))}",
        f"ours against traker:       {described(itertools.product(own, other))}",
        f"means over the seeds:      {correlation(sum(own), sum(other)):.4f}",
        sep="\n",
    )


if __name__ == "__main__":
    main()
