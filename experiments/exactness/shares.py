"""Is what exact unrolling lacks its own mistake, or the curvature of the truth?

python -m experiments.exactness.shares runs/exactness/smooth_momentum

The score is a derivative, and leaving an example out is a step of 1 in its weight. Here the same
subsets and single examples of a study are left out to a share of 1 (its weight becomes 0), 0.3 and
0.1 of their weight, in float64, and the changes of the outcomes compared with Unrolled's scores:
what is lost at 1 and found again at 0.1 is the truth's own bend.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate

from experiments.lds.linear import doubled, in_float64
from experiments.lds.study import quiet
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import Unrolled
from tda_lightning.evaluation import (
    leave_one_out,
    linear_datamodeling_score,
    measure,
    retrain_each,
)

_SHARES = (1.0, 0.3, 0.1)


def main() -> None:
    """Print a row for each share, and keep them in shares.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what study.py wrote")
    parser.add_argument("--subsets", type=int, default=50, help="the first so many only")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    config = json.loads((options.folder / "results.json").read_text())["config"]
    torch.set_num_threads(config["threads"])
    data = instantiate(config["data"], _convert_="all")
    data.setup()
    module = instantiate(config["model"], _convert_="all")
    task = instantiate(config["task"], _convert_="all")
    trajectory = Trajectory.load(options.folder)
    attribution = AttributionModule(module, trajectory, Unrolled(), task)
    scores = attribution.attribute(
        data.train_dataset, data.query_dataset, trainer=quiet(), self_influence=False
    )
    with np.load(options.folder / "outcomes.npz") as found:
        subsets = torch.from_numpy(found["subsets"])[: options.subsets]
    with np.load(options.folder / "left_out.npz") as found:
        examples = torch.from_numpy(found["examples"])
    train, query = doubled(data.train_dataset), doubled(data.query_dataset)
    single = torch.zeros(len(examples), len(train), dtype=torch.float64)
    single[torch.arange(len(examples)), examples] = 1
    absent = torch.cat([torch.zeros(1, len(train)), single, (~subsets).double()])
    work = (in_float64(trajectory), module.double(), task, train)
    rows = []
    print(f"| {config['name']}: share | LDS | left out singly: correlation, slope |\n|---|---|---|")
    for share in _SHARES:
        states = retrain_each(*work, 1 - share * absent, together=config["together"])
        outcomes = torch.stack([measure(module, task, state, query) for state in states])
        baseline, alone = outcomes[0], outcomes[1 : len(examples) + 1]
        lds = linear_datamodeling_score(scores, subsets, outcomes[len(examples) + 1 :])
        left_out = leave_one_out(scores, examples, (alone - baseline) / share, 0 * baseline)
        print(f"| {share} | {lds} | {left_out.correlation:.4f}, {left_out.slope:.3f} |", flush=True)
        rows.append([share, lds.value, lds.low, lds.high, left_out.correlation, left_out.slope])
    (options.folder / "shares.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
