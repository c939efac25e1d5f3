"""(a) Weights that take word-label correlations out of MNLI: what remains in the model?

A pair's *lean* is the sum, over its frequent words, of how much more often "not entailed" comes
with the word than it comes at all, in the training pairs at weights 1. A held-out pair is *with*
the words where its lean has the sign of its label, else *against* them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from experiments.reweight.training import encoder, losses_of, outputs_of, trained
from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.evaluation import retrain
from tda_lightning.examples.data import MNLIData
from tda_lightning.reweighting import (
    WeightedTraining,
    balanced_weights,
    imbalance,
    predicted_change,
    weights_from_scores,
)
from tda_lightning.reweighting.features import word_features
from tda_lightning.tasks import ClassificationTask

RUNS = Path("runs/reweight")
NUM_TRAIN, MIN_COUNT, BOUND, PENALTY = 4000, 20, 4.0, 0.01
STEPS = (0.1, 0.5)  # of weights from scores; the last one is trained with


class Data:
    """Pairs, their words and their leans; the same for every seed."""

    def __init__(self, root: str) -> None:
        data = MNLIData(root=root, num_train=NUM_TRAIN, num_query=None)
        self.train: Any = data.train_dataset
        labels = self.train.tensors[1]
        documents = data.documents("train")
        self.features, self.words = word_features(documents, MIN_COUNT)
        self.balance = balanced_weights(self.features, labels, BOUND, PENALTY)
        tilt = imbalance(self.features, labels, torch.ones(len(labels)))[:, 1]
        place = {word: number for number, word in enumerate(self.words)}
        lean = torch.zeros(len(data.query_dataset), dtype=torch.float64)
        for row, words in enumerate(data.documents("query")):
            lean[row] = sum(float(tilt[place[word]]) for word in set(words) if word in place)
        inputs, answers = data.query_dataset.tensors
        centred = lean - lean.median()
        # Every other held-out pair is the target of scores, the others are tests.
        half = torch.arange(len(answers)) % 2 == 0
        against = (centred > 0) != (answers == 1)
        self.target = TensorDataset(inputs[half & against], answers[half & against])
        self.test = TensorDataset(inputs[~half], answers[~half])
        self.lean, self.against = centred[~half], against[~half]

    def summary(self) -> dict[str, Any]:
        """Sizes, and correlations before and after."""
        before, after = self.balance.before[:, 1].abs(), self.balance.after[:, 1].abs()
        weights = self.balance.weights
        return {
            "train": len(self.train),
            "words": len(self.words),
            "target": len(self.target),
            "test": len(self.test),
            "against": int(self.against.sum()),
            "mean_before": float(before.mean()),
            "mean_after": float(after.mean()),
            "largest_before": float(before.max()),
            "largest_after": float(after.max()),
            "zero": int((weights == 0).sum()),
            "largest_weight": float(weights.max()),
            "effective": float(weights.sum() ** 2 / weights.square().sum()),
            "gap": self.balance.gap,
        }


def seed_results(data: Data, seed: int) -> dict[str, Any]:
    """Models of one seed with equal weights, balanced ones and such from scores."""
    folder = RUNS / f"words{seed}"
    recorder = TrajectoryRecorder(folder, curvature="online", overwrite=True)
    equal = trained(data.train, seed, [recorder])
    task = ClassificationTask()
    attribution = AttributionModule(
        encoder(), trajectory=str(folder), estimator=InfluenceFunction(), task=task
    )
    scores = attribution.attribute(
        data.train, data.target, trainer=silent_trainer(), self_influence=False
    ).values
    by_scores = {step: weights_from_scores(scores, step, BOUND) for step in STEPS}
    given = {"balanced": data.balance.weights, "scores": by_scores[STEPS[-1]]}
    models = {"equal": equal}
    for name, weights in given.items():
        models[name] = trained(data.train, seed, [WeightedTraining(weights)])
    before = losses_of(equal, data.target).double()
    changes = []
    trajectory = Trajectory.load(str(folder))
    for name, weights in {"balanced": data.balance.weights, **by_scores}.items():
        again = encoder()
        again.load_state_dict(retrain(trajectory, encoder(), task, data.train, weights))
        true = losses_of(again, data.target).double() - before
        predicted = predicted_change(scores, weights)
        changes.append(
            {
                "weights": str(name),
                "true": float(true.mean()),
                "predicted": float(predicted.mean()),
                "correlation": float(torch.corrcoef(torch.stack([true, predicted]))[0, 1]),
            }
        )
    imbalances = {
        name: float(imbalance(data.features, data.train.tensors[1], weights)[:, 1].abs().mean())
        for name, weights in given.items()
    }
    behaviours = {name: behaviour(model, data) for name, model in models.items()}
    return {"models": behaviours, "changes": changes, "imbalance": imbalances}


def behaviour(model: Any, data: Data) -> dict[str, Any]:
    """Accuracy with and against the words, and how the answer follows the words."""
    inputs, answers = data.test.tensors
    outputs = outputs_of(model, inputs).double()
    right = (outputs.argmax(1) == answers).double()
    margin = outputs[:, 1] - outputs[:, 0]
    return {
        "accuracy": float(right.mean()),
        "with": float(right[~data.against].mean()),
        "against": float(right[data.against].mean()),
        "follows": follows(margin, data.lean, answers),
    }


def follows(margin: Tensor, lean: Tensor, answers: Tensor) -> float:
    """Correlation of the model's margin for "not entailed" with the lean of the words, among pairs
    with the same label: mean over the labels."""
    found = [
        torch.corrcoef(torch.stack([margin[answers == label], lean[answers == label]]))[0, 1]
        for label in (0, 1)
    ]
    return float(torch.stack(found).mean())
