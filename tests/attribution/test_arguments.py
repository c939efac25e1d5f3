"""Arguments of the wrong kind are refused where they are passed, and the refusal says what is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, TrajectoryRecorder, evaluation
from tda_lightning.edits import Removal
from tda_lightning.estimators import FastInfluence, InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.evaluation import detection_auc, found_within
from tda_lightning.solvers import ASTRA, ConjugateGradients, Direct, Lanczos, LiSSA
from tda_lightning.tasks import ClassificationTask
from tests.runs import trainer


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


DATA = TensorDataset(torch.arange(24.0).view(6, 4) / 24, torch.arange(6) % 3)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Net, Path]:
    path, module = tmp_path_factory.mktemp("run") / "run", Net()
    trainer(TrajectoryRecorder(path), max_epochs=1).fit(module, DataLoader(DATA, 3))
    return module, path


CONSTRUCTOR: list[tuple[dict[str, Any], str]] = [
    ({"estimator": "source"}, r"estimator must be .* such as Source\(\) .* got 'source'"),
    ({"estimator": "influence"}, r"estimator must be .*Influence.*got 'influence'"),
    ({"estimator": TracIn}, r"such as TracIn\(\) .*got <class"),
    ({"estimator": None}, "estimator must be .*got None"),
    ({"estimator": {"curvature": "ekfac"}}, "estimator must be .*got {"),
    ({"module": Net}, r"module must be the module .* got the class Net: make one of it"),
    ({"module": "net"}, "module must be .*got 'net'"),
    ({"module": [None]}, "module must be .*got None"),
    ({"trajectory": None}, "trajectory must be the folder .*got None"),
    ({"trajectory": 3}, "trajectory must be the folder .*got 3"),
    ({"trajectory": [0.5]}, r"trajectory must be the folder .*got 0\.5"),
    ({"task": "classification"}, r"task must be a task, such as ClassificationTask\(\).*got 'cl"),
    ({"task": ClassificationTask}, "got the class ClassificationTask: make one"),
    (
        {"trajectory": [["a", "b"], ["c", "d"]]},
        r"consecutive stages .* got \['a', 'b'\] in the list",
    ),
    ({"fresh": "head"}, r"fresh must be a list of names, such as fresh=\['head'\]; got 'head'"),
]


@pytest.mark.parametrize(("given", "said"), CONSTRUCTOR)
def test_of_the_constructor(given, said, recorded) -> None:
    module, path = recorded
    arguments = {"module": module, "trajectory": str(path), "estimator": TracIn(), **given}
    with pytest.raises(TypeError, match=said):
        AttributionModule(**arguments)


ATTRIBUTE: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": "8"}, "batch_size must be a whole number, got '8'"),
    ({"batch_size": 2.5}, "batch_size must be a whole number"),
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"self_influence": "no"}, "self_influence must be true or false or null"),
    ({"scores_path": 3}, "scores_path must be the path"),
    ({"provenance": "mine"}, "provenance must be a dictionary"),
    ({"edits": Removal(1)}, r"edits must be a list, such as edits=\[Removal\(3\)\]"),
    ({"edits": [1]}, r"edits must hold edits .* such as Removal\(3\); got 1"),
    ({"edits": [Removal]}, "edits must hold edits"),
    ({"trainer": "ddp"}, "trainer must be a lightning"),
    ({"draws": "two"}, "draws must be a whole number or null"),
    ({"train": None}, "training must be a map-style Dataset"),
    ({"query": 5}, "query must be a map-style Dataset"),
]


@pytest.mark.parametrize(("given", "said"), ATTRIBUTE)
def test_of_an_attribution(given, said, recorded) -> None:
    module, path = recorded
    attribution = AttributionModule(module, path, TracIn())
    with pytest.raises((TypeError, ValueError), match=said):
        attribution.attribute(**{"train": DATA, "query": DATA, **given})
    if given.keys() <= {"batch_size", "self_influence", "trainer", "draws", "train", "query"}:
        with pytest.raises((TypeError, ValueError), match=said):
            attribution.plan(**{"train": DATA, "query": DATA, **given})


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (Source, {"num_segments": "three"}, "Source: num_segments must be a whole number, got"),
        (Source, {"num_segments": 2.5}, "num_segments must be a whole number, got 2.5"),
        (Source, {"curvature": None}, "curvature must be a text, got None"),
        (Source, {"segment_steps": 3}, "segment_steps must be a list"),
        (Source, {"segment_steps": "3,4"}, "segment_steps must be a list"),
        (InfluenceFunction, {"relative_damping": "0.1"}, "relative_damping must be a number"),
        (InfluenceFunction, {"seed": None}, "seed must be a whole number"),
        (FastInfluence, {"k": "all"}, "FastInfluence: k must be a whole number"),
        (FastInfluence, {"layer": 3}, "layer must be a text or null"),
        (Unrolled, {"memory_budget": "1GB"}, "memory_budget must be a whole number or null"),
        (Unrolled, {"token_weights": 1}, "token_weights must be true or false"),
        (ConjugateGradients, {"tolerance": "small"}, "tolerance must be a number"),
        (LiSSA, {"depth": "10"}, "LiSSA: depth must be a whole number, got '10'"),
        (Lanczos, {"rank": None}, "rank must be a whole number"),
        (ASTRA, {"step": "auto"}, "step must be a number or null"),
        (Direct, {"curvature": 3}, "curvature must be a text"),
    ],
)
def test_of_settings(kind, given, said) -> None:
    with pytest.raises(TypeError, match=said):
        kind(**given)


def test_settings_that_stand_for_a_number_are_taken() -> None:
    assert Unrolled(memory_budget=1e9).memory_budget == 1e9  # type: ignore[arg-type]
    assert InfluenceFunction(damping=1).damping == 1
    assert Source(segment_steps=(3, 4)).segment_steps == (3, 4)
    assert Source(segment_steps=[[3], []]).segment_steps == [[3], []]


def test_self_influence_that_is_not_there_says_why(recorded) -> None:
    module, path = recorded
    scores = AttributionModule(module, path, FastInfluence()).attribute(DATA, DATA)
    wrong = torch.arange(6) < 2
    for judge in (detection_auc, lambda own, marks: found_within(own, marks, 0.5)):
        with pytest.raises(ValueError, match=r"no self-influence\. No self-influence: it takes"):
            judge(scores, wrong)
        with pytest.raises(ValueError, match=r"no self-influence\. Attribute with self_infl"):
            judge(scores.self_influence, wrong)


def test_features_carry_no_graph_where_the_task_needs_one(recorded) -> None:
    """task=None takes losses apart by their derivatives, even where no gradients are asked for."""
    module, path = recorded
    state = {name: p.detach() for name, p in module.named_parameters()}
    scores = evaluation.last_layer_cosine(module, None, state, DATA, DATA)
    assert not scores.values.requires_grad
    scores.values.numpy()
    attribution = AttributionModule(module, path, FastInfluence(k=2))
    assert attribution.plan(DATA, DATA).num_query == 6
    assert not attribution.attribute(DATA, DATA).values.requires_grad
