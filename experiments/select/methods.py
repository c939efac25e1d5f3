"""Ten steps on ten pairs, chosen in different ways for the same anchors."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from experiments.select.recorded import Run
from tda_lightning import AttributionModule
from tda_lightning.edits import additions
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.estimators.neighbours import nearest
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.selection.pool_features import features_of
from tda_lightning.selection.selecting import run_moved_to, score_additions
from tda_lightning.selection.training_on import TrainingOn

METHODS = ("helpful", "balanced", "harmful", "nearest", "random", "less", "anchors")
RATES = (5e-4, 2e-3)  # the mean of the run, and twice its largest
REPLICAS, STEPS, ANCHORS, CHOSEN, NEIGHBOURS = 3, 10, 10, 10, 100
SCORED = ("helpful", "balanced", "harmful")


class Choosing:
    """What all methods need of a run, found once."""

    def __init__(self, run: Run, less: Tensor | None) -> None:
        self.run, self.less = run, less
        self.attribution = AttributionModule(
            run.module, run.trajectory, InfluenceFunction(), run.task
        )
        self.offered = additions(run.pool)
        self.points = self._features(run.target)
        self.others = self._features(run.pool)
        self.close = nearest(self.points, self.others, NEIGHBOURS)
        # Pairs of the pool, followed by the target: to be trained on by one number.
        self.all = ExampleSource(ConcatDataset([run.pool, run.target]), 256)

    def _features(self, pairs: Any) -> Tensor:
        run = self.run
        source = ExampleSource(pairs, 256)
        return features_of(run.module, run.task, run.trajectory, source, None)

    def tuned(self, method: str, rate: float, replica: int) -> dict[str, Any]:
        """Train from the recorded weights on what a method chooses; how the model then answers."""
        began = time.process_time()
        run = self.run
        draw = torch.Generator().manual_seed(replica)  # anchors as tda select draws them
        chance = torch.Generator().manual_seed(1000 + replica)
        training = TrainingOn(run.trajectory, run.module, run.task, self.all, rate, seed=0)
        chosen = []
        for _ in range(STEPS):
            drawn = torch.randperm(len(run.target), generator=draw)[:ANCHORS].sort().values
            picked = self._picked(method, training, drawn, chance)
            chosen.append(picked)
            training.train(picked)
        seconds = time.process_time() - began
        own = torch.cat(chosen)
        own = own[own < len(run.labels)]
        answers = answers_of(run, training.where.tensors)
        return {
            "method": method,
            "rate": rate,
            "replica": replica,
            "seconds": round(seconds, 2),
            "chosen": len(own),
            "distinct": len(own.unique()),
            "not_entailed": _share(run.labels[own] == 1),
            "contradicting": _share(run.contradicting[own]),
            **answers,
        }

    def _picked(
        self, method: str, training: TrainingOn, drawn: Tensor, chance: torch.Generator
    ) -> Tensor:
        """Numbers of the pairs of a step."""
        run, size = self.run, len(self.run.labels)
        if method == "anchors":
            return size + drawn
        if method == "random":
            return torch.randperm(size, generator=chance)[:CHOSEN]
        if method == "nearest":
            return nearest(self.points[drawn].mean(0, keepdim=True), self.others, CHOSEN)[0]
        if method == "less":
            assert self.less is not None
            return self.less[drawn].mean(0).topk(CHOSEN).indices
        near = self.close[drawn].unique()
        scores = score_additions(
            self.attribution,
            ExampleSource(run.train, 256),
            run_moved_to(run.trajectory, training),
            ExampleSource(Subset(run.target, drawn.tolist()), 256),
            [self.offered[place] for place in near.tolist()],
        )
        return near[by_score(method, scores, run.labels[near])]


def by_score(method: str, scores: Tensor, labels: Tensor) -> Tensor:
    """Places of the pairs that a method takes by the predicted change of the anchors' loss."""
    if method == "harmful":
        return (-scores).argsort(stable=True)[:CHOSEN]
    if method == "balanced":  # as many of each label
        parts = []
        for label in (0, 1):
            own = (labels == label).nonzero().flatten()
            parts.append(own[scores[own].argsort(stable=True)[: CHOSEN // 2]])
        return torch.cat(parts)
    best = scores.argsort(stable=True)[:CHOSEN]
    return best[scores[best] < 0]


def answers_of(run: Run, state: Any) -> dict[str, str]:
    """By set, for each test pair whether the answer is right (1 or 0), and whether it is "not
    entailed"."""
    run.module.load_state_dict(state)
    run.module.eval()
    found = {}
    with torch.no_grad():
        for name, (inputs, targets) in run.test.items():
            said = torch.cat([run.module(part).argmax(1) for part in inputs.split(300)])
            found[f"right_{name}"] = _digits(said == targets)
            found[f"said_not_{name}"] = _digits(said == 1)
    return found


def _digits(values: Tensor) -> str:
    return "".join(str(int(value)) for value in values.tolist())


def _share(values: Tensor) -> float | None:
    return round(float(values.double().mean()), 4) if len(values) else None
