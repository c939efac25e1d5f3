"""Is what exact unrolling lacks its own mistake, or the bend of the truth?

python -m experiments.exactness.shares runs/exactness/smooth_momentum

The score is a derivative, and leaving an example out is a step of 1 in its weight. Here a study's
run is recorded once more in float64, and the same subsets and single examples are left out to a
share of 1 (weight 0), 0.3, ... of their weight. What is lost at 1 and found again at a small share
is the truth's own bend.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from experiments.lds.linear import doubled
from experiments.lds.study import quiet, record
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import Unrolled
from tda_lightning.evaluation import (
    leave_one_out,
    linear_datamodeling_score,
    measure,
    retrain_each,
)

_SHARES = (1.0, 0.3, 0.1, 1e-2, 1e-4, 1e-6)


def main() -> None:
    """Print a row for each share, and keep them in shares.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what study.py wrote")
    parser.add_argument("--subsets", type=int, default=40, help="the first so many only")
    parser.add_argument("--examples", type=int, default=39, help="so many left out singly")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    config = OmegaConf.create(json.loads((options.folder / "results.json").read_text())["config"])
    torch.set_num_threads(config.threads)
    config.recorder.path = str(options.folder / "float64")
    # The fingerprint would be of the examples in float32, and the scores are of float64.
    config.trainer.precision, config.recorder.fingerprint = "64-true", False
    data, module, task = record(config)
    train, query = doubled(data.train_dataset), doubled(data.query_dataset)
    module.double()
    trajectory = Trajectory.load(config.recorder.path)
    attribution = AttributionModule(module, trajectory, Unrolled(), task)
    scores = attribution.attribute(train, query, trainer=quiet(), self_influence=False)
    with np.load(options.folder / "outcomes.npz") as found:
        subsets = torch.from_numpy(found["subsets"])[: options.subsets]
    with np.load(options.folder / "left_out.npz") as found:
        examples = torch.from_numpy(found["examples"])[: options.examples]
    single = torch.zeros(len(examples), len(train), dtype=torch.float64)
    single[torch.arange(len(examples)), examples] = 1
    absent = torch.cat([torch.zeros(1, len(train)), single, (~subsets).double()])
    rows = []
    print(f"| {config.name}: share | LDS | left out singly: correlation, slope |\n|---|---|---|")
    for share in _SHARES:
        weights = 1 - share * absent
        together = max(config.together, 20)
        states = retrain_each(trajectory, module, task, train, weights, together=together)
        outcomes = torch.stack([measure(module, task, state, query) for state in states])
        baseline, alone = outcomes[0], outcomes[1 : len(examples) + 1]
        lds = linear_datamodeling_score(scores, subsets, outcomes[len(examples) + 1 :])
        left_out = leave_one_out(scores, examples, (alone - baseline) / share, 0 * baseline)
        print(f"| {share} | {lds} | {left_out.correlation:.4f}, {left_out.slope:.3f} |", flush=True)
        rows.append([share, lds.value, lds.low, lds.high, left_out.correlation, left_out.slope])
    (options.folder / "shares.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
