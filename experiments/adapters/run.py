"""Pre-train, fine-tune with adapters and as a whole, train again on halves, score.

    python -m experiments.adapters.run --data-root FOLDER [MODEL ...] [--kinds lora full]

What is there is not done again, row by row: ``runs/adapters`` holds the runs, ``results/`` what the
table needs (``results.py``).
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from experiments.adapters import results, setting
from experiments.adapters.setting import KINDS, MODELS, Data
from experiments.models.cases import HuggingFaceModule, Rows
from tda_lightning import AttributionModule, Ensemble, Trajectory, ensembles
from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.evaluation import draw_subsets, measure, retrain_each
from tda_lightning.solvers import ConjugateGradients, DataInf, LiSSA

SUBSETS, TOGETHER = 40, 20
RECORDED, ANEW, OTHERS = 0, (1, 2), (3, 4)  # seeds: scored; of the truth; further members


@dataclass(frozen=True)
class Row:
    """An estimator and what it scores."""

    estimator: Callable[[], Any]
    keep: float = 1.0
    ensemble: str | None = None  # "seeds", or "lora": adapters on the end of the recorded run


ROWS = {
    "TracIn": Row(TracIn),
    "influence, identity": Row(lambda: InfluenceFunction(curvature="identity")),
    "influence, diagonal": Row(lambda: InfluenceFunction(curvature="diagonal")),
    "influence, K-FAC": Row(lambda: InfluenceFunction(curvature="kfac")),
    "influence, EK-FAC": Row(InfluenceFunction),
    "influence, DataInf": Row(lambda: InfluenceFunction(solver=DataInf())),
    "SOURCE": Row(Source),
    "unrolled": Row(Unrolled),
    "SOURCE, half kept": Row(Source, keep=0.5),
    "3 runs, EK-FAC": Row(InfluenceFunction, ensemble="seeds"),
    "3 runs, SOURCE": Row(Source, ensemble="seeds"),
    "3 sets of adapters on the end, EK-FAC": Row(InfluenceFunction, ensemble="lora"),
    "influence, LiSSA (100 steps)": Row(lambda: InfluenceFunction(solver=LiSSA(depth=100))),
    "influence, conjugate gradients": Row(lambda: InfluenceFunction(solver=ConjugateGradients())),
}
COSTLY = ("influence, LiSSA (100 steps)", "influence, conjugate gradients")


@dataclass(frozen=True)
class Problem:
    """One model, fine-tuned in one way."""

    name: str
    kind: str
    data: Data
    base: nn.Module
    folder: Path

    def module(self, seed: int = RECORDED) -> HuggingFaceModule:
        return setting.module(self.name, self.kind, copy.deepcopy(self.base), seed)

    def run(self, seed: int = RECORDED) -> Path:
        """The folder of a recorded run, which is trained where it is not there yet."""
        place = self.folder / f"{self.name}_{self.kind}_{seed}"
        if not (place / "trained").exists():
            setting.fine_tune(self.module(seed), self.data.train, seed, place)
            (place / "trained").touch()
        return place


def retrained(problem: Problem, seed: int, subsets: Tensor) -> Tensor:
    """The queries' losses after the run of a seed with half of the data: [subset, query]."""
    run, module = Trajectory.load(problem.run(seed)), problem.module(seed)
    found = []
    train = loader(problem.data.train)
    for state in retrain_each(run, module, None, train, subsets.float(), together=TOGETHER):
        queries = loader(problem.data.queries)
        found.append(measure(module, None, state, queries, trajectory=run))
    return torch.stack(found)


def loader(rows: Rows, batch: int = 32) -> DataLoader[Any]:
    return DataLoader(rows, batch, collate_fn=default_collate)


def scored(problem: Problem, row: Row) -> Tensor:
    """[query, train]"""
    trajectory: Any = problem.run()
    if row.ensemble == "seeds":
        trajectory = Ensemble([problem.run(seed) for seed in (RECORDED, *OTHERS)])
    elif row.ensemble == "lora":
        trajectory = adapters(problem)
    attribution = AttributionModule(problem.module(), trajectory, row.estimator())
    scores = attribution.attribute(
        loader(problem.data.train), loader(problem.data.queries),
        self_influence=False, keep=row.keep,
    )  # fmt: skip
    return scores.values


def adapters(problem: Problem) -> Any:
    """Sets of adapters, each trained from the end of the recorded run."""

    def make(seed: int) -> Any:
        made = setting.training(problem.module(), problem.data.train, seed)
        return replace(made, data=setting.Batches(made.data))

    return ensembles.adapt(problem.run(), make, members=3, rank=setting.RANK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--solvers", action="store_true", help="LiSSA and CG too: minutes each")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    subsets = draw_subsets(setting.TRAIN, 0.5, SUBSETS)
    for name in options.models:
        data = setting.load(name, options.data_root)
        base = setting.pretrained(name, data, options.folder)
        for kind in options.kinds:
            problem = Problem(name, kind, data, base, options.folder)
            study(problem, subsets, options.solvers)


def study(problem: Problem, subsets: Tensor, solvers: bool) -> None:
    kept = results.Results.read(problem.name, problem.kind)
    for seed in (RECORDED, *ANEW):
        if f"outcomes_{seed}" not in kept.arrays:
            began = time.process_time()
            kept.add(f"outcomes_{seed}", retrained(problem, seed, subsets))
            print(problem.name, problem.kind, seed, f"{time.process_time() - began:.0f} s")
    for title, row in ROWS.items():
        own = row.ensemble == "lora" and problem.kind == "lora"  # adapters of adapters
        if title in kept.seconds or own or (title in COSTLY and not solvers):
            continue
        began = time.process_time()
        values = scored(problem, row)
        kept.add_scores(title, values, time.process_time() - began)
        print(problem.name, problem.kind, title, f"{kept.seconds[title]:.0f} s", flush=True)


if __name__ == "__main__":
    main()
