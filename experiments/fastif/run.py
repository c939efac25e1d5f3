"""Record, score, solve and fine-tune: every part goes on where it stopped.

python -m experiments.fastif.run --data-root FOLDER
python -m experiments.fastif.table --write

Results go to experiments/fastif/results, which experiments.fastif.table reads; recorded runs and
scores are kept in runs/fastif.
"""

from __future__ import annotations

import argparse
import warnings
from functools import cache

import torch

from experiments.fastif.exact import gather
from experiments.fastif.kept import once
from experiments.fastif.quality import quality, times
from experiments.fastif.recall import fast_scores, recall
from experiments.fastif.recorded import SEEDS, open_run, record
from experiments.fastif.tuning import correct, simulate
from tda_lightning.cli.command import quiet_lightning


def main() -> None:
    """All parts of all seeds that are not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", help="folder of the data sets")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    warnings.filterwarnings("ignore", module="lightning")
    for seed in options.seeds:
        study(seed, options.data_root)


def study(seed: int, data_root: str | None) -> None:
    """The parts of one seed."""
    run = open_run(record(seed, data_root), seed)
    fast = fast_scores(run)
    if seed == SEEDS[0]:  # the solver's time and quality are not about the run
        once("times", seed, lambda: times(run))
    once("correct", seed, lambda: correct(run, fast))
    once("simulate", seed, lambda: simulate(run, fast))
    once("recall_ekfac", seed, lambda: recall(run, fast, fast.values.double()))
    exact = cache(lambda: gather(run))
    once("recall_exact", seed, lambda: recall(run, fast, exact().scores(0.0)))
    if seed == SEEDS[0]:
        once("quality", seed, lambda: quality(run, fast, exact()))


if __name__ == "__main__":
    main()
