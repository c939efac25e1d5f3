"""(a) How many of the true top influences are among the nearest neighbours of a query?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.fastif.kept import interval
from experiments.fastif.recorded import Run
from tda_lightning import AttributionModule, Scores
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import FastInfluence

KS = (10, 30, 100, 300, 1000, 3000)  # and all
TOPS = (10, 100)


def fast_scores(run: Run) -> Scores:
    """FastIF with its default settings and all training pairs as candidates, nearest first: those
    of any smaller k are a part of them."""
    path = run.folder / "scores" / "fastif.h5"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        estimator = FastInfluence(k=len(run.train))  # type: ignore[arg-type]
        attribution = AttributionModule(run.module, run.trajectory, estimator, run.task)
        attribution.attribute(
            run.train,
            run.queries,
            trainer=silent_trainer(),
            self_influence=False,
            scores_path=str(path),
        )
    return Scores.load(path)


def recalls(candidates: Tensor, truth: Tensor, top: int) -> Tensor:
    """Share of each query's ``top`` largest scores that are candidates, [query]."""
    best = truth.topk(top, dim=1).indices
    among = torch.zeros(truth.shape, dtype=torch.bool)
    among.scatter_(1, candidates, True)
    return among.gather(1, best).double().mean(1)


def recall(run: Run, fast: Scores, scores: Tensor) -> dict[str, Any]:
    """By queries, sign and number of influences: the recall of the largest and smallest ``scores``
    at every k, with intervals."""
    assert fast.candidates is not None
    rows, ks = [], [*KS, fast.num_train]
    for queries, part in {"mnli": run.mnli, "hans": run.hans}.items():
        for sign, values in {"helpful": scores, "harmful": -scores}.items():
            for top in TOPS:
                found = [
                    interval(recalls(fast.candidates[part, :k], values[part], top)) for k in ks
                ]
                rows.append({"queries": queries, "sign": sign, "top": top, "recall": found})
    return {"num_train": fast.num_train, "ks": ks, "rows": rows}
