"""The whole study: train, retrain, score, keep what the table needs, write the table.

python -m experiments.two_stages.run --data-root FOLDER

FOLDER holds ``mnist/``. Interrupted, the same command goes on: the recorded runs and every
retraining are kept in ``runs/two_stages``, which belongs to one setting: after a change, give
another ``--folder``.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from experiments.two_stages import results, setting, table
from experiments.two_stages.derivative import derivative
from experiments.two_stages.results import keep
from experiments.two_stages.scores import DAMPINGS, DEFAULT_DAMPING, HALF, estimators
from experiments.two_stages.setting import network
from experiments.two_stages.truth import SUBSETS, ground_truth, replayed
from tda_lightning import Trajectory
from tda_lightning.evaluation import landing_error
from tda_lightning.recording.facts import package_versions


def main() -> None:
    """Each part once; the table at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="the folder of mnist/")
    parser.add_argument("--folder", type=Path, default=Path("runs/two_stages"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data = setting.load(options.data_root)
    runs = recorded(options.folder, data)
    truths = {
        protocol: ground_truth(protocol, runs, data, options.folder / f"{protocol}.h5")
        for protocol in table.PROTOCOLS
    }
    found = scored(options.folder, runs, data, truths["single_run"].subsets)
    results.write(
        table.HERE / "results",
        results.Results(
            outcomes={name: truth.outcomes for name, truth in truths.items()},
            ranks={name: results.ranked(kept, SUBSETS) for name, (kept, _) in found.items()},
            seconds={name: round(seconds, 1) for name, (_, seconds) in found.items()},
            judging=SUBSETS,
            dampings=DAMPINGS,
            default_damping=DEFAULT_DAMPING,
            facts={
                **facts(runs, data),
                "unrolling and the forward derivative": {
                    f"at weights of {words}": disagreement(
                        found[f"unrolled{where}"][0], found[f"exact{where}"][0]
                    )
                    for words, where in (("1", ""), ("1/2", " at half"))
                },
            },
        ),
    )
    table.publish()


def recorded(folder: Path, data: setting.Data, seed: int = setting.SEED) -> list[Trajectory]:
    """Both runs, trained where they are not there yet."""
    if not (folder / "recorded").exists():
        setting.train_both(data.stages, folder, seed)
        (folder / "recorded").touch()
    return setting.recorded(folder)


def scored(
    folder: Path, runs: Sequence[Trajectory], data: setting.Data, subsets: Tensor
) -> dict[str, tuple[Tensor, float]]:
    """Of each estimator: the sums of the scores of what subsets keep [query, subset]; seconds.

    Seconds of one thread's own time, so that they do not depend on what else the machine does.
    """
    work: dict[str, Callable[[], Tensor]] = {
        name: lambda score=score: kept_sums(score(), subsets)
        for name, score in estimators(runs, data).items()
    }

    def exact(*weights: float) -> Tensor:
        return -derivative(runs, network(1), data.stages, data.queries, subsets, weights)

    work["exact"] = lambda: exact(1, 1)
    work["exact at half"] = lambda: exact(HALF, HALF)
    work["exact at half of stage 1"] = lambda: exact(HALF, 1)
    found = {}
    for name, predict in work.items():
        path = folder / f"{name.replace(' ', '_')}.npz"
        if not path.exists():
            began = time.process_time()
            predicted = predict()
            keep(path, predicted=predicted.numpy(), seconds=time.process_time() - began)
        with np.load(path, allow_pickle=False) as kept:
            found[name] = torch.from_numpy(kept["predicted"]), float(kept["seconds"])
        print(f"{name}: {found[name][1]:.1f} s", file=sys.stderr, flush=True)
    return found


def kept_sums(scores: Tensor, subsets: Tensor) -> Tensor:
    """Of what each subset keeps, float64 [query, subset]."""
    return scores.double() @ subsets.double().T


def disagreement(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference of predictions [query, subset] of any query, each up to a
    constant of its own."""
    found, expected = (
        own.double() - own.double().mean(1, keepdim=True) for own in (found, expected)
    )
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def facts(runs: Sequence[Trajectory], data: setting.Data) -> dict[str, Any]:
    """What the README tells of the run besides."""
    ends = [run.checkpoints[run.last_step].parameters for run in runs]
    whole = torch.ones(1, len(data.stages[0]))
    landing = {
        words: landing_error(runs[1], next(replayed(runs, data, whole, together)))
        for words, together in (("one by one", 1), ("stacked", 2))
    }
    return {
        "accuracy": {
            f"after stage {number}": {
                "its training set": accuracy(end, stage),
                "test, angles of stage 1": accuracy(end, data.tests[0]),
                "test, angles of stage 2": accuracy(end, data.tests[1]),
            }
            for number, (end, stage) in enumerate(zip(ends, data.stages, strict=True), start=1)
        },
        "landing error of a replay": landing,
        "versions": package_versions(),
    }


def accuracy(parameters: Mapping[str, Tensor], data: TensorDataset) -> float:
    """Share of the pictures that are classified rightly."""
    module = network(1)
    module.load_state_dict(dict(parameters))
    with torch.no_grad():
        return float((module(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean())


if __name__ == "__main__":
    main()
