"""Compare what `AttributionModule.plan` says with what the attribution then takes.

python -m experiments.plan.measure                       all experiments, under ten minutes
python -m experiments.plan.measure --only digits         some of them
python -m experiments.plan.measure --clock processor     processor time, for a machine with company

Estimate and attribution run in turn, each in a process of its own, on the same recorded run. With
the processor clock both are told in seconds of one busy processor core (one thread).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

# Shipped experiments, with fewer examples where a whole one takes too long for this table.
EXPERIMENTS: dict[str, list[str]] = {
    "concrete": [],
    "digits": [],
    "fashion_mnist_mlp": ["data.num_train=2000", "data.num_query=50", "trainer.max_epochs=2"],
    "fashion_mnist_cnn": ["data.num_train=1000", "data.num_query=50", "trainer.max_epochs=2"],
    "cifar10_resnet9": ["data.num_train=128", "data.num_query=10", "trainer.max_epochs=2"],
    "wikitext2_gpt": ["data.num_train=128", "data.num_query=10", "trainer.max_epochs=2"],
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "tracin": {"_target_": "tda_lightning.estimators.TracIn"},
    "influence": {"_target_": "tda_lightning.estimators.InfluenceFunction"},
    "source": {"_target_": "tda_lightning.estimators.Source"},
    "source, recorded": {"_target_": "tda_lightning.estimators.Source", "order": "recorded"},
    "unrolled": {"_target_": "tda_lightning.estimators.Unrolled"},
}
Found = dict[str, Any]


def record(name: str, folder: Path, root: str, threads: int) -> None:
    command = [sys.executable, "-m", "tda_lightning.cli", "train", f"experiment={name}"]
    command += [f"output={folder}", f"threads={threads}", "overwrite=true", *EXPERIMENTS[name]]
    if name != "digits":
        command.append(f"data.root={root}")
    subprocess.run(command, check=True, capture_output=True)


def child(arguments: argparse.Namespace) -> None:
    """One estimate or one attribution; its findings as the last line of output."""
    import torch
    from hydra.utils import instantiate

    from tda_lightning import AttributionModule
    from tda_lightning.cli.run_config import build, load_config
    from tda_lightning.runtime import clock
    from tda_lightning.runtime.memory import PeakMemory

    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.clock == "processor":
        clock.now = time.process_time
    what, estimator = arguments.child
    recorded = load_config(arguments.folder)
    data = build(recorded.data, False)
    module = build(recorded.model, False, optimizer=None, scheduler=None)
    attribution = AttributionModule(
        module,
        str(arguments.folder),
        instantiate(ESTIMATORS[estimator]),
        build(recorded.get("task"), False),
    )
    sets = {"train": data.train_dataset, "query": data.query_dataset}
    began = clock.now()
    if what == "plan":
        plan = attribution.plan(**sets)
        found: Found = {
            "seconds": plan.seconds,
            "bytes": plan.peak_bytes,
            "scores": plan.scores_bytes,
            "curvature": plan.curvature_bytes,
            "passes": {one.title: [one.count, one.seconds] for one in plan.passes},
            "preparation": plan.preparation,
        }
    else:
        with PeakMemory() as memory, tempfile.TemporaryDirectory() as temporary:
            scores = Path(temporary) / "scores.h5"
            attribution.attribute(**sets, scores_path=str(scores))
            found = {"seconds": clock.now() - began, "bytes": memory.bytes}
            found["scores"] = scores.stat().st_size
            kept = arguments.folder / "curvature"
            found["curvature"] = sum(file.stat().st_size for file in kept.glob("*.h5"))
    found["took"] = clock.now() - began
    print(json.dumps(found))


def run(arguments: argparse.Namespace, what: str, estimator: str, folder: Path) -> Found:
    shutil.rmtree(folder / "curvature", ignore_errors=True)
    command = [sys.executable, "-m", "experiments.plan.measure", "--child", what, estimator]
    command += ["--folder", str(folder), "--clock", arguments.clock]
    command += ["--threads", str(arguments.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str, estimator: str, planned: list[Found], real: list[Found]) -> str:
    def middle(runs: list[Found], key: str) -> float:
        return statistics.median(float(one[key]) for one in runs)

    seconds = [middle(runs, "seconds") for runs in (planned, real)]
    every = [f"{a['seconds'] / b['seconds']:.2f}" for a, b in zip(planned, real, strict=True)]
    sizes = [
        f"{middle(planned, key) / 1e6:.1f} / {middle(real, key) / 1e6:.1f}"
        for key in ("bytes", "scores", "curvature")
    ]
    return (
        f"| {name} | {estimator} | {seconds[0]:.1f} | {seconds[1]:.1f} | "
        f"{seconds[0] / seconds[1]:.2f} ({', '.join(every)}) | {middle(planned, 'took'):.1f} | "
        f"{' | '.join(sizes)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, help="experiments")
    parser.add_argument("--estimators", nargs="*", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--root", default=os.environ.get("TDA_DATA_ROOT", "data"))
    parser.add_argument("--folder", type=Path, default=Path("runs/plan"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    everything: dict[str, Any] = {}
    print(
        "| experiment | estimator | planned s | taken s | planned / taken (each) | "
        "planning took s | peak MB: planned / taken | scores MB | curvature MB |\n"
        "|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in arguments.only or EXPERIMENTS:
        folder = arguments.folder / name
        record(name, folder, arguments.root, arguments.threads)
        for estimator in arguments.estimators:
            planned, real = [], []
            for _ in range(arguments.repeats):
                planned.append(run(arguments, "plan", estimator, folder))
                real.append(run(arguments, "attribute", estimator, folder))
            print(row(name, estimator, planned, real), flush=True)
            everything[f"{name} {estimator}"] = {"planned": planned, "taken": real}
            (arguments.folder / "results.json").write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
