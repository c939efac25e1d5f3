"""Record, score, retrain and compare: one study after another, going on where it stopped.

python -m experiments.fidelity.run --data-root FOLDER                      # all of them: hours
python -m experiments.fidelity.run concrete --data-root FOLDER
python -m experiments.fidelity.run concrete --data-root FOLDER --peers .venv-peers/bin/python

What exists is kept: the recorded run, each file of scores, each retraining. The outcome is written
to experiments/fidelity/results, which experiments.fidelity.table reads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from experiments.fidelity.kept import keep
from experiments.fidelity.studies import (
    ESTIMATORS,
    KRONFLUENCE_DAMPINGS,
    STUDIES,
    TRAK_DAMPINGS,
    Study,
)
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.cli.run_config import build, load_config
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import TracIn
from tda_lightning.evaluation.baselines import (
    last_checkpoint,
    last_layer_cosine,
    random_scores,
    self_loss,
)

RUNS = Path("runs/fidelity")
ALPHA = 0.5


def main() -> None:
    """The studies that are named, or all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--data-root", help="folder of the data sets")
    parser.add_argument("--peers", help="the Python of experiments/peers' environment")
    parser.add_argument("--scores-only", action="store_true", help="no retraining")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for name in options.studies:
        if name not in STUDIES:
            parser.error(f"expected studies among {', '.join(STUDIES)}, got {name}")
    for name in options.studies or STUDIES:
        study, folder = STUDIES[name], RUNS / name
        if not (folder / "config.yaml").exists():
            root = [] if options.data_root is None else [f"data.root={options.data_root}"]
            tda("train", f"experiment=fidelity/{name}", *root, f"threads={options.threads}")
        score(study, folder, options.threads)
        score_cheaply(folder)
        if options.peers is not None:
            score_elsewhere(study, folder, options.peers, options.threads)
        if not options.scores_only:
            retrain(study, folder, options.threads)
            keep(name, folder)


def score(study: Study, folder: Path, threads: int) -> None:
    """By every estimator of ours."""
    for name, settings in ESTIMATORS.items():
        target = folder / "scores" / f"{name}.h5"
        if target.exists() or name in study.without:
            continue
        tda(
            "attribute",
            f"trajectory={folder}",
            *settings,
            f"scores={target}",
            "self_influence=false",
            f"threads={threads}",
        )


def score_cheaply(folder: Path) -> None:
    """By what costs almost nothing."""
    scores = folder / "scores"
    names = ("random", "self_loss", "last_layer", "gradient_dot")
    if all((scores / f"{name}.h5").exists() for name in names):
        return
    recorded, trajectory = load_config(folder), Trajectory.load(str(folder))
    data = build(recorded.data, trust=False)
    module = build(recorded.model, trust=False, optimizer=None, scheduler=None)
    task = build(recorded.task, trust=False)
    train, query = data.train_dataset, data.query_dataset
    last = trajectory.checkpoints[trajectory.last_step]
    state = {**last.buffers, **last.parameters}
    dotted = AttributionModule(module, last_checkpoint(trajectory), TracIn(), task)
    makers = {
        "random": lambda: random_scores(len(query), len(train)),
        "self_loss": lambda: self_loss(module, task, state, train, len(query)),
        "last_layer": lambda: last_layer_cosine(module, task, state, train, query),
        "gradient_dot": lambda: dotted.attribute(
            train, query, trainer=silent_trainer(), self_influence=False
        ),
    }
    for name, make in makers.items():
        began = time.process_time()
        found = make()
        told = {**found.provenance, "estimator": name}
        told["processor_seconds"] = time.process_time() - began
        replace(found, provenance=told).save(scores / f"{name}.h5")


def score_elsewhere(study: Study, folder: Path, python: str, threads: int) -> None:
    """By the outside libraries, in their own environment."""
    scores = folder / "scores"
    dampings = ["--damping", "default", *TRAK_DAMPINGS]
    large = ["--batch-size", "500"]  # traker draws its projection anew for each batch
    libraries = {
        "kronfluence": ["kronfluence", "--damping", "default", *KRONFLUENCE_DAMPINGS],
        "trak": ["trak", *large, *dampings],
        "trak_last": ["trak", *large, *dampings, "--checkpoints", "last"],
        "captum": ["captum"],
    }
    for name, (library, *options) in libraries.items():
        target = scores / f"{name}.h5"
        if name in study.peers and not target.exists():
            command = [python, "-m", f"experiments.peers.{library}", str(folder), *options]
            settings = ["--output", str(target), "--threads", str(threads)]
            print(*command, *settings, flush=True)
            subprocess.run([*command, *settings], check=True)


def retrain(study: Study, folder: Path, threads: int) -> None:
    """The ground truth in both protocols, and on other subsets to choose dampings by."""
    common = [f"trajectory={folder}", f"alpha={ALPHA}", "baselines=[random]", f"threads={threads}"]
    common += [f"scores={folder / 'scores' / 'source.h5'}"]
    both = ["protocol=algorithm", "seeds=2"], ["protocol=single_run", f"together={study.together}"]
    for protocol in both:
        tda("evaluate", *common, *protocol, f"num_subsets={study.subsets}")
    for protocol in both:
        if study.validated in protocol[0]:
            tda("evaluate", *common, *protocol, f"num_subsets={study.validation}", "seed=1")


def tda(*arguments: str) -> None:
    """A command of ours, as a process of its own."""
    print("tda", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "tda_lightning.cli", *arguments], check=True)


if __name__ == "__main__":
    main()
