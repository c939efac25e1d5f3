"""python -m experiments.select.run --data-root FOLDER      # goes on where it stopped"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence

import torch

from experiments.select.kept import load, path_of, save
from experiments.select.less import less_scores
from experiments.select.methods import METHODS, RATES, REPLICAS, Choosing, answers_of
from experiments.select.recorded import RUNS, SEEDS, open_run, record
from tda_lightning.cli.command import quiet_lightning


def main() -> None:
    """Every method, rate and replica of every seed, one row after another."""
    parser = argparse.ArgumentParser(description="Which unseen pairs help HANS-like ones?")
    parser.add_argument("--data-root", help="folder of the data; null: as in the configuration")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    warnings.filterwarnings("ignore", module="lightning")
    for seed in options.seeds:
        study(seed, options.data_root, options.rates)


def study(seed: int, data_root: str | None, rates: Sequence[float]) -> None:
    """The rows of one seed that are not there yet."""
    run, found = open_run(record(seed, data_root)), load(seed)
    done = {(row["method"], row["rate"], row["replica"]) for row in found["rows"]}
    wanted = [
        (method, rate, replica)
        for replica in range(REPLICAS)
        for rate in rates
        for method in METHODS
        if (method, rate, replica) not in done
    ]
    if not wanted:
        return
    last = run.trajectory.checkpoints[run.trajectory.last_step]
    before = answers_of(run, {**last.buffers, **last.parameters})
    if found.get("before", before) != before:
        raise SystemExit(
            f"The kept rows of seed {seed} are of another run than {RUNS / f'seed{seed}'}: its "
            f"answers differ. Delete {path_of(seed)} to begin this seed anew."
        )
    found["before"] = before
    found["sizes"] = {
        "train": len(run.train),  # type: ignore[arg-type]
        "pool": len(run.labels),
        "contradicting": int(run.contradicting.sum()),
        "pool_not_entailed": float(run.labels.double().mean()),
        "target": len(run.target),
        "test": {name: len(pairs[1]) for name, pairs in run.test.items()},
    }
    less = None
    if any(method == "less" for method, *_ in wanted):
        began = time.process_time()
        less = less_scores(run)
        found["less_seconds"] = round(time.process_time() - began, 1)
    choosing = Choosing(run, less)
    for method, rate, replica in wanted:
        found["rows"].append(choosing.tuned(method, rate, replica))
        save(seed, found)
        print(seed, method, rate, replica, found["rows"][-1]["seconds"], flush=True)


if __name__ == "__main__":
    main()
