"""How many walks over the training set conjugate gradients need on a small transformer.

python -m experiments.solvers.iterations --data-root FOLDER

Trains a GPT of a few thousand weights on WikiText-2 (runs/solvers/small_gpt) and solves for queries
one at a time and in blocks, plain and preconditioned by EK-FAC. The outcome is written to
experiments/solvers/results/iterations.json, row by row, and what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from experiments.fidelity.run import tda
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.cli.run_config import build, load_config, versions
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.solvers import ConjugateGradients

RUN = Path("runs/solvers/small_gpt")
RESULTS = Path(__file__).parent / "results"
SETTINGS = [
    "experiment=wikitext2_gpt",
    "name=solvers/small_gpt",
    "threads=1",
    "data.vocabulary_size=32",
    "data.sequence_length=16",
    "data.batch_size=32",
    "data.num_train=512",
    "data.num_query=100",
    "model.network.width=8",
    "model.network.depth=2",
    "model.network.heads=2",
    "optimizer.lr=0.003",
    "trainer.max_epochs=38",
]

DAMPINGS = (1.0, 0.1)  # times the mean eigenvalue
BLOCKS = (1, 10, 100)  # queries at once, the first so many
PRECONDITIONERS = (None, "ekfac")


def main() -> None:
    """Record the run where there is none, solve, and write down how it went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", help="folder of the data sets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (RUN / "config.yaml").exists():
        root = [] if options.data_root is None else [f"data.root={options.data_root}"]
        tda("train", *SETTINGS, *root, f"output={RUN}")
    file, rows = RESULTS / "iterations.json", []
    if file.exists():
        rows = json.loads(file.read_text())["rows"]
    RESULTS.mkdir(exist_ok=True)
    facts = Trajectory.load(str(RUN)).facts.parameters.values()
    size = sum(int(np.prod(fact.shape)) for fact in facts)
    for queries, damping, preconditioner in product(BLOCKS, DAMPINGS, PRECONDITIONERS):
        asked = {"damping": damping, "preconditioner": preconditioner, "queries": queries}
        if any(asked.items() <= row.items() for row in rows):
            continue
        rows.append(asked | solve(damping, preconditioner, queries))
        print(rows[-1], flush=True)
        outcome = {"parameters": size, "rows": rows, "versions": versions()}
        file.write_text(json.dumps(outcome, indent=1) + "\n")


def solve(damping: float, preconditioner: str | None, queries: int) -> dict[str, Any]:
    """Walks until all of these queries have a relative residual of 1e-4."""
    recorded = load_config(RUN)
    data = build(recorded.data, trust=False)
    module = build(recorded.model, trust=False, optimizer=None, scheduler=None)
    solver = ConjugateGradients(preconditioner, tolerance=1e-4, iterations=2000)
    found = AttributionModule(
        module,
        Trajectory.load(str(RUN)),
        InfluenceFunction(relative_damping=damping, solver=solver),
        build(recorded.task, trust=False),
    ).attribute(
        train=data.train_dataset,
        query=Subset(data.query_dataset, range(queries)),
        batch_size=512,
        trainer=silent_trainer(),
        self_influence=False,
    )
    told = found.provenance["solver"]
    return {
        "walks": round(told["products"] / queries),
        "residual": told["relative_residual"]["max"],
        "seconds": found.provenance["processor_seconds"],
    }


if __name__ == "__main__":
    main()
