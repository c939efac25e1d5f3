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

from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from tda_lightning import Scores
from tda_lightning.cli import main as tda
from tda_lightning.cli.recorded import build, load_config

RUN = Path("runs/demo")
ESTIMATORS = ("source", "tracin", "influence")


def run(command: str) -> None:
    """Run one command line, shown first as one would type it."""
    print(f"\n$ {command}", flush=True)
    status = tda(shlex.split(command)[1:])
    if status:
        sys.exit(status)


def flipped_labels() -> list[bool]:
    """For each training example of the run, whether its label was flipped."""
    data = build(load_config(RUN).data, trust=False)
    wrong = [False] * len(data.train_dataset)
    for index in data.flipped.tolist():
        wrong[index] = True
    return wrong


def agreement(first: Scores, second: Scores) -> float:
    """Spearman's rank correlation between two estimators' scores, averaged over the queries."""
    rows = zip(first.values, second.values, strict=True)
    return sum(spearmanr(a, b).statistic for a, b in rows) / first.num_queries


def main() -> None:
    started = time.monotonic()
    run(f"tda train experiment=digits output={RUN} overwrite=true")
    for name in ESTIMATORS:
        run(f"tda attribute trajectory={RUN} estimator={name} overwrite=true")
    for name in ESTIMATORS:
        run(f"tda report scores={RUN}/scores/{name}.h5")
    run(f"tda inspect {RUN}")

    scores = {name: Scores.load(RUN / "scores" / f"{name}.h5") for name in ESTIMATORS}
    wrong = flipped_labels()
    print(f"\nFinding the {sum(wrong)} flipped labels among {len(wrong)} by self-influence (AUC):")
    for name in ESTIMATORS:
        print(f"  {name:<10} {roc_auc_score(wrong, scores[name].self_influence):.3f}")
    print(f"Agreement of the scores (Spearman, mean over {scores['source'].num_queries} queries):")
    for first, second in combinations(ESTIMATORS, 2):
        print(f"  {first:<10} {second:<10} {agreement(scores[first], scores[second]):.3f}")
    print(f"Report: {RUN / 'scores' / 'source.html'}")
    print(f"Done in {time.monotonic() - started:.0f} seconds.")


if __name__ == "__main__":
    main()
