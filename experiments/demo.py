"""The main job, as `make demo` runs it: train, attribute three ways, report, and compare.

A small convolutional network learns scikit-learn's digits with a tenth of the training labels
wrong. Good self-influence finds the wrong labels, so each estimator is judged by how well it does.
"""

from __future__ import annotations

import shlex
import sys
import time
from itertools import combinations
from pathlib import Path

import torch

from tda_lightning import Scores
from tda_lightning.cli import main as tda
from tda_lightning.cli.run_config import build, load_config
from tda_lightning.evaluation import agreement, detection_auc

RUN = Path("runs/demo")
ESTIMATORS = ("source", "tracin", "influence")


def run(command: str) -> None:
    """Run one command line, shown first as one would type it."""
    print(f"\n$ {command}", flush=True)
    status = tda(shlex.split(command)[1:])
    if status:
        sys.exit(status)


def flipped_labels() -> torch.Tensor:
    """For each training example of the run, whether its label was flipped: bool [train]."""
    data = build(load_config(RUN).data, trust=False)
    wrong = torch.zeros(len(data.train_dataset), dtype=torch.bool)
    wrong[data.flipped] = True
    return wrong


def main() -> None:
    started = time.monotonic()
    run(f"tda train experiment=digits output={RUN} overwrite=true")
    for name in ESTIMATORS:
        # The demo is about wrong labels, which self-influence finds.
        asked = "self_influence=true overwrite=true"
        run(f"tda attribute trajectory={RUN} estimator={name} {asked}")
    for name in ESTIMATORS:
        run(f"tda report scores={RUN}/scores/{name}.h5")
    run(f"tda inspect {RUN}")

    scores = {name: Scores.load(RUN / "scores" / f"{name}.h5") for name in ESTIMATORS}
    wrong = flipped_labels()
    flipped = f"{int(wrong.sum())} flipped labels among {len(wrong)}"
    print(f"\nFinding the {flipped} by self-influence (AUC):")
    for name in ESTIMATORS:
        print(f"  {name:<10} {detection_auc(scores[name], wrong):.3f}")
    print(f"Agreement of the scores (Spearman, mean over {scores['source'].num_queries} queries):")
    for first, second in combinations(ESTIMATORS, 2):
        print(f"  {first:<10} {second:<10} {agreement(scores[first], scores[second]).value:.3f}")
    print(f"Report: {RUN / 'scores' / 'source.html'}")
    print(f"Done in {time.monotonic() - started:.0f} seconds.")


if __name__ == "__main__":
    main()
