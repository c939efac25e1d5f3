"""What tda check says of a run, beside how well each prediction ranks its retrainings.

python experiments/smoothness/measure.py runs/lds/digits_mlp runs/lds/digits ...

Each folder is what ../lds/study.py wrote, and ../lds/linear.py after it: there, subsets that keep
95% were retrained, the estimators were scored, and the finite difference of retraining was taken in
float64. Here other subsets are left out by a thousandth, by half and wholly. Prints a row of
README.md for each.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate

from tda_lightning import Trajectory
from tda_lightning.evaluation import Smoothness, linear_datamodeling_score, smoothness

ESTIMATORS = ("recorded", "source", "influence", "tracin")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="what study.py wrote")
    parser.add_argument("--directions", type=int, default=8)
    parser.add_argument("--share", type=float, default=1e-3)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    head = [
        "run",
        "metasmoothness",
        "halfway",
        "near",
        "verdict",
        "LDS: difference",
        *ESTIMATORS,
    ]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for folder in options.folders:
        results = json.loads((folder / "results.json").read_text())
        found = smooth(results["config"], folder, options.directions, options.share)
        numbers = [found.metasmoothness, found.halfway, found.near]
        known = [f"{results['lds'][name][0]:.2f}" for name in ESTIMATORS]
        row = [folder.name, *map(str, numbers), found.verdict, exact(folder), *known]
        print(f"| {' | '.join(row)} |", flush=True)


def smooth(config: dict, folder: Path, directions: int, share: float) -> Smoothness:
    """The estimate, its directions being none of the subsets that were retrained."""
    data = instantiate(config["data"], _convert_="all")
    data.setup()
    module = instantiate(config["model"], _convert_="all")
    task = instantiate(config["task"], _convert_="all")
    return smoothness(
        Trajectory.load(folder),
        module,
        task,
        data.train_dataset,
        data.query_dataset,
        directions=directions,
        share=share,
        fraction=1 - config["fraction"],
        seed=config["subset_seed"] + 1,
        together=config["together"],
    )


def exact(folder: Path) -> str:
    """LDS of the finite difference of retraining; of none where linear.py has not been."""
    if not (folder / "linear.npz").exists():
        return "-"
    with np.load(folder / "linear.npz") as kept, np.load(folder / "outcomes.npz") as retrained:
        changes = torch.from_numpy(kept["exact"])
        outcomes = torch.from_numpy(retrained["outcomes"])[: len(changes)].double()
    return str(linear_datamodeling_score(-changes.T, torch.eye(len(changes)).bool(), outcomes))


if __name__ == "__main__":
    main()
