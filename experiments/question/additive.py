"""How well can any additive score do? A datamodel, fitted to thousands of retrainings.

python -m experiments.question.additive --data-root FOLDER        # some minutes

Scores predict a retraining by a sum over the examples that it leaves out. The best such sum is what
a regression finds when it sees the outcomes themselves (datamodels: Ilyas et al. 2022, section 3):
an upper bound for every estimator, which sees no retraining at all. The regression is fitted to
replays of the recorded run on random halves of the data, and judged on the same subsets as the
estimators are, which it has not seen. The kept file, results/additive_NAME.npz::

    counts        replays that the datamodel is fitted to
    single_run    LDS on the replays of the test subsets, [count, query]
    algorithm     LDS on trainings anew on the same subsets, [count, query]
    seconds       of the replays
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.fidelity.run import tda
from experiments.question import kept
from experiments.question.run import RUNS
from tda_lightning import Trajectory
from tda_lightning.cli.run_config import build, load_config
from tda_lightning.evaluation import draw_subsets, measure, retrain_each
from tda_lightning.evaluation.linear_datamodeling import Interval, bootstrap, rank_correlation

COUNTS = (250, 500, 1000, 2000, 4000)
SEED = 1000  # of the subsets that are fitted to; the test subsets have the seed 0
TOGETHER = 100
RIDGES = (1e-2, 1e-1, 1.0, 10.0, 100.0)  # of a unit of the Gram matrix's mean eigenvalue


@dataclass(frozen=True)
class Additive:
    """LDS of datamodels, by protocol, [count, query], and the replays that each was fitted to."""

    counts: list[int]
    lds: dict[str, Tensor]

    def interval(self, protocol: str, number: int) -> Interval:
        """The mean over queries with its bootstrap interval."""
        return bootstrap(self.lds[protocol][number])


def main() -> None:
    """Retrain, fit and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", default="concrete")
    parser.add_argument("--data-root", help="folder of the data sets")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name, folder = options.study, RUNS / options.study
    if not (folder / "config.yaml").exists():
        root = [] if options.data_root is None else [f"data.root={options.data_root}"]
        renamed = [f"experiment=fidelity/{name}", f"name=question/{name}"]
        tda("train", *renamed, *root, f"threads={options.threads}")
    began = time.process_time()
    subsets, outcomes = replays(folder, max(COUNTS))
    seconds = time.process_time() - began
    truth = {p: kept.load(name).truth[p, 0.5] for p in ("single_run", "algorithm")}
    found: dict[str, list[Tensor]] = {protocol: [] for protocol in truth}
    for count in COUNTS:
        effects = fitted(subsets[:count], outcomes[:count])
        for protocol, outcome in truth.items():
            judged = draw_subsets(subsets.shape[1], 0.5, outcome.shape[1])
            found[protocol].append(rank_correlation(effects @ judged.double().T, outcome))
    arrays = {protocol: torch.stack(rows).float().numpy() for protocol, rows in found.items()}
    file = kept.RESULTS / f"additive_{name}.npz"
    np.savez_compressed(file, counts=np.array(COUNTS), seconds=np.array(seconds), **arrays)


def replays(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Random halves, bool [subset, train], and the queries' measurements, [subset, query]."""
    recorded, trajectory = load_config(folder), Trajectory.load(str(folder))
    data = build(recorded.data, trust=False)
    module = build(recorded.model, trust=False, optimizer=None, scheduler=None)
    task = build(recorded.task, trust=False)
    train, query = data.train_dataset, data.query_dataset
    subsets = draw_subsets(len(train), 0.5, count, seed=SEED)
    work = (trajectory, module, task, train, subsets.float())
    outcomes = [
        measure(module, task, state, query) for state in retrain_each(*work, together=TOGETHER)
    ]
    return subsets, torch.stack(outcomes).double()


def fitted(subsets: Tensor, outcomes: Tensor) -> Tensor:
    """Effects of keeping each example, [query, train]: ridge regression, whose strength is the one
    that predicts the last fifth of the replays best after a fit to the others."""
    count = len(subsets) * 4 // 5
    errors = [
        (_predicted(subsets[:count], outcomes[:count], r, subsets[count:]) - outcomes[count:])
        .square()
        .mean()
        for r in RIDGES
    ]
    best = RIDGES[int(torch.stack(errors).argmin())]
    return _ridge(subsets, outcomes, best).T


def _ridge(subsets: Tensor, outcomes: Tensor, strength: float) -> Tensor:
    """[train, query]."""
    inputs = subsets.double() - subsets.double().mean(0)
    targets = outcomes - outcomes.mean(0)
    gram = inputs.T @ inputs
    gram.diagonal().add_(strength * gram.diagonal().mean())
    return torch.linalg.solve(gram, inputs.T @ targets)


def _predicted(subsets: Tensor, outcomes: Tensor, strength: float, others: Tensor) -> Tensor:
    effects = _ridge(subsets, outcomes, strength)
    return (others.double() - subsets.double().mean(0)) @ effects + outcomes.mean(0)


def load(name: str) -> Additive | None:
    """The kept results; None if there are none."""
    file = kept.RESULTS / f"additive_{name}.npz"
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        lds = {p: torch.from_numpy(arrays[p]) for p in ("single_run", "algorithm")}
        return Additive(arrays["counts"].tolist(), lds)


if __name__ == "__main__":
    main()
