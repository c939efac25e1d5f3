"""What exact unrolling costs, in units of the training run that it differentiates.

python -m experiments.exactness.cost --root FOLDER                     all three problems
python -m experiments.exactness.cost --only fashion_mnist_mlp --root FOLDER
python -m experiments.exactness.cost --only fashion_mnist_mlp --budgets --root FOLDER

A training run is ``Trainer.fit`` of the shipped experiment without recorder and validation, an
attribution is ``attribute`` from first to last, both in the same process and in turn; medians over
the rounds. With --budgets, the peak memory of one attribution, each in a process of its own,
against the budget that it was given.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig
from torch.utils.data import Subset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import Unrolled
from tda_lightning.runtime.memory import PeakMemory

# Shipped experiments, with fewer examples and epochs where 100 queries would take hours.
EXPERIMENTS: dict[str, list[str]] = {
    "fashion_mnist_mlp": ["data.num_train=5000", "trainer.max_epochs=2"],
    "fashion_mnist_cnn": ["data.num_train=1280", "trainer.max_epochs=2"],
    "wikitext2_gpt": ["data.num_train=1280", "trainer.max_epochs=1"],
}
QUERIES = (1, 10, 100)
MIB = 1 << 20
BUDGETS = (None, 4096, 1024, 256, 128, 64, 32)  # MiB


def configured(name: str, root: str) -> DictConfig:
    conf = Path(__file__).resolve().parents[2] / "conf"
    settings = [f"experiment={name}", f"data.root={root}", "data.num_query=100"]
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("train", overrides=[*settings, *EXPERIMENTS[name]])


def trained(config: DictConfig, data: Any, *callbacks: Any) -> tuple[Any, float]:
    """The module after training, and the seconds that it took."""
    seed_everything(config.seed, verbose=False)
    module = instantiate(config.model, _convert_="all")
    trainer = Trainer(
        max_epochs=config.trainer.max_epochs,
        callbacks=list(callbacks),
        limit_val_batches=0,
        accelerator="cpu",
        **_QUIET,
    )
    began = time.perf_counter()
    trainer.fit(module, datamodule=data)
    return module, time.perf_counter() - began


_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def attributed(
    config: DictConfig, data: Any, folder: str, queries: int, **options: Any
) -> tuple[Any, float]:
    """Scores, and the seconds that they took."""
    module = instantiate(config.model, _convert_="all")
    task = instantiate(config.task, _convert_="all")
    attribution = AttributionModule(module, folder, Unrolled(**options), task)
    trainer = Trainer(devices=1, accelerator="cpu", inference_mode=False, **_QUIET)
    chosen = Subset(data.query_dataset, range(queries))
    began = time.perf_counter()
    scores = attribution.attribute(data.train_dataset, chosen, trainer=trainer)
    return scores, time.perf_counter() - began


def costs(name: str, root: str, queries: Sequence[int], rounds: int) -> None:
    """Print a row of the table."""
    config = configured(name, root)
    data = instantiate(config.data, _convert_="all")
    data.setup()
    with tempfile.TemporaryDirectory() as folder:
        # The first run warms up.
        trained(config, data, TrajectoryRecorder(folder, num_checkpoints=6))
        training: list[float] = []
        found: dict[int, list[float]] = {count: [] for count in queries}
        for _ in range(rounds):
            for count in queries:
                training.append(trained(config, data)[1])
                scores, seconds = attributed(config, data, folder, count)
                found[count].append(seconds)
        steps = Trajectory.load(folder).last_step
        equal = scores.provenance["certificate"]["bit_equal"]
    unit = statistics.median(training)
    runs = {count: statistics.median(taken) / unit for count, taken in found.items()}
    cells = " | ".join(f"{value:.1f}" for value in runs.values())
    saving = queries[-1] / queries[0] * runs[queries[0]] / runs[queries[-1]]
    print(f"| {name} | {steps} | {unit:.1f} | {cells} | {saving:.1f} | {equal} |", flush=True)


def peak(name: str, root: str, folder: str, budget: int | None) -> None:
    """Print the peak memory of one attribution of ten queries, as JSON."""
    config = configured(name, root)
    data = instantiate(config.data, _convert_="all")
    data.setup()
    options = {} if budget is None else {"memory_budget": budget * MIB}
    with PeakMemory() as memory:
        scores, seconds = attributed(config, data, folder, 10, **options)
    total = float(scores.values.double().sum())
    print(json.dumps({"bytes": memory.bytes, "seconds": seconds, "sum": total}))


def budgets(name: str, root: str) -> None:
    """Print a table of budgets, each attribution in a process of its own."""
    config = configured(name, root)
    data = instantiate(config.data, _convert_="all")
    data.setup()
    with tempfile.TemporaryDirectory() as folder:
        trained(config, data, TrajectoryRecorder(folder, num_checkpoints=2))
        print("| memory_budget MiB | peak above start MiB | seconds | sum of scores |")
        print("|---|---|---|---|", flush=True)
        for budget in BUDGETS:
            command = [sys.executable, "-m", "experiments.exactness.cost", "--root", root]
            command += ["--only", name, "--peak", folder, str(budget or 0)]
            command += ["--threads", str(torch.get_num_threads())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"| {budget} | refused: {done.stderr.strip().splitlines()[-1]} | | |")
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {budget or 'default'} | {row['bytes'] / MIB:.0f} | {row['seconds']:.1f} | "
                f"{row['sum']:.9g} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--root", required=True, help="folder of the data sets")
    parser.add_argument("--queries", nargs="*", type=int, default=list(QUERIES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budgets", action="store_true")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        folder, budget = arguments.peak
        peak(arguments.only[0], arguments.root, folder, int(budget) or None)
        return
    if arguments.budgets:
        for name in arguments.only:
            budgets(name, arguments.root)
        return
    columns = " | ".join(f"Q = {count}" for count in arguments.queries)
    rule = "|".join("---" for _ in arguments.queries)
    print(f"| experiment | steps | training s | {columns} | saving | bit-equal |")
    print(f"|---|---|---|{rule}|---|---|", flush=True)
    for name in arguments.only:
        costs(name, arguments.root, arguments.queries, arguments.rounds)


if __name__ == "__main__":
    main()
