"""How far a study's LDS could get at best, and how far each estimator is from exact unrolling.

python experiments/lds/linear.py runs/lds/digits_mlp

Every estimator predicts linearly: the change of a subset's outcome is the sum over its left-out
examples. The exact derivative of retraining does so too, and is found here in float64: leave the
same examples out to a share of 1e-4, retrain, divide the change by the share. Its LDS is what is
left of 1 when nothing but linearity is assumed, in smooth networks: with max pooling tiny changes
make the run jump, and the derivative says nothing about larger ones (README.md). The slope is the
factor by which an estimator's sums have to be multiplied to fit the exact ones best: 1 is the right
size, 0.5 is twice too large.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor
from torch.utils.data import TensorDataset

from tda_lightning import Trajectory
from tda_lightning.evaluation import linear_datamodeling_score, measure, retrain_each

_SHARE = 1e-4


def main() -> None:
    """Print the ceiling, then a row for each estimator of the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what study.py wrote")
    parser.add_argument("--subsets", type=int, default=None, help="the first so many only")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    config = json.loads((options.folder / "results.json").read_text())["config"]
    torch.set_num_threads(config["threads"])
    with np.load(options.folder / "outcomes.npz") as found:
        subsets = torch.from_numpy(found["subsets"])[: options.subsets]
        outcomes = torch.from_numpy(found["outcomes"])[: options.subsets].double()
        end = found["end"]
    kept = options.folder / "linear.npz"
    exact = already(kept, end, len(subsets))
    if exact is None:
        exact = exact_changes(config, options.folder, subsets)
        np.savez_compressed(kept, exact=exact.numpy(), end=end)
    print(f"{config['name']}: exact linear prediction, {len(subsets)} subsets")
    # With subsets as "examples" of their own, a score of a subset is minus its predicted change.
    ceiling = linear_datamodeling_score(-exact.T, torch.eye(len(subsets)).bool(), outcomes)
    print(f"  LDS of the exact derivative {ceiling}")
    with np.load(options.folder / "predictions.npz") as found:
        for name in found:
            rows = torch.from_numpy(found[name])[: len(subsets)]
            alike = linear_datamodeling_score(-rows.T, torch.eye(len(subsets)).bool(), exact)
            slope = float((rows * exact).sum() / rows.square().sum())
            print(f"  {name:<16} rank correlation with it {alike}, slope {slope:.2f}")


def already(path: Path, end: np.ndarray, count: int) -> Tensor | None:
    """What an earlier call found for the same run, if it went through as many subsets."""
    if not path.exists():
        return None
    with np.load(path) as found:
        if len(found["exact"]) < count or not np.array_equal(found["end"], end):
            return None
        return torch.from_numpy(found["exact"][:count])


def exact_changes(config: dict[str, Any], folder: Path, subsets: Tensor) -> Tensor:
    """Derivative of each query's measurement along each subset's left-out weights, negated:
    [subset, query]."""
    data = instantiate(config["data"], _convert_="all")
    data.setup()
    module = instantiate(config["model"], _convert_="all").double()
    task = instantiate(config["task"], _convert_="all")
    train, query = doubled(data.train_dataset), doubled(data.query_dataset)
    weights = torch.cat([torch.ones(1, len(train)), 1 - _SHARE * (~subsets).double()])
    states = retrain_each(
        in_float64(Trajectory.load(folder)),
        module,
        task,
        train,
        weights,
        together=config["together"],
    )
    measured = torch.stack([measure(module, task, state, query) for state in states])
    return (measured[1:] - measured[0]) / _SHARE


def doubled(dataset: TensorDataset) -> TensorDataset:
    """The data in float64, labels as they are."""
    return TensorDataset(*(t.double() if t.is_floating_point() else t for t in dataset.tensors))


def in_float64(trajectory: Trajectory) -> Trajectory:
    """The recorded run, started from its initial weights in float64."""
    start = trajectory.checkpoints[0]
    wide = {
        kind: {
            name: t.double() if t.is_floating_point() else t
            for name, t in getattr(start, kind).items()
        }
        for kind in ("parameters", "buffers")
    }
    checkpoints = {**trajectory.checkpoints, 0: replace(start, **wide)}
    return Trajectory(trajectory.facts, trajectory.steps, checkpoints)


if __name__ == "__main__":
    main()
