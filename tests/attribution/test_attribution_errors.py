"""What attribution refuses, by message, and what it leaves as it was."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tda_lightning import AttributionModule, Scores
from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.gradients import GradientEngine
from tda_lightning.records.errors import (
    NonFiniteError,
    TrajectoryMismatchError,
    UnsupportedTrainingError,
)
from tda_lightning.store import fingerprint
from tda_lightning.tasks import AttributionTask, ClassificationTask, sampled_gauss_newton_loss
from tests import oracles
from tests.attributing import CaseTask, attribute, quiet
from tests.cases.training import CLASSIFIER, MLP, OPTIMIZERS, queries_of, train


class Classifier(LightningModule):
    """A module that logs, draws (dropout) and counts (batch norm) as it trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)
        ).double()
        self.net[0].bias.requires_grad_(False)

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels)
        self.log("train/loss", loss)
        return loss


def logits_loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


@pytest.fixture
def work():
    """A recorded run, its module and data sets."""
    return work_of(Classifier())


def work_of(module: nn.Module):
    data, queries = CLASSIFIER.batch(10), queries_of(CLASSIFIER)
    run = oracles.record_run(
        module,
        logits_loss,
        data,
        lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1, 0.5),
        oracles.cut_batches(10, 5, epochs=3),
        (2, 4),
    )
    return run, module, TensorDataset(*data), TensorDataset(*queries)


def state(module: nn.Module) -> dict:
    """All that an attribution could leave changed."""
    return {
        "modes": {name: part.training for name, part in module.named_modules()},
        "tensors": {name: t.clone() for name, t in module.state_dict().items()},
        "identity": {name: id(p) for name, p in module.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "grad": {name: p.grad for name, p in module.named_parameters()},
        "log": (module.log, "log" in vars(module)),
        "hooks": len(module._forward_hooks),
        "threads": torch.is_grad_enabled(),
    }


def require_same_state(before: dict, after: dict) -> None:
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(tensor, after["tensors"][name]), name
    after.pop("tensors")
    assert before == after


@pytest.mark.parametrize("estimator", [TracIn(), InfluenceFunction(), Source(2)])
def test_the_module_is_left_as_it_was(work, estimator) -> None:
    run, module, data, queries = work
    module.train()
    module.net[2].eval()
    before = state(module)
    AttributionModule(module, run, estimator).attribute(data, queries, trainer=quiet())
    require_same_state(before, state(module))


@pytest.mark.parametrize("draws", [False, True])
def test_the_module_is_left_as_it_was_by_replays(draws) -> None:
    """Also by those that are refused: nothing is known of what dropout drew."""
    module = Classifier()
    if not draws:  # what was recorded here by hand was trained in eval mode
        module.net[1] = module.net[2] = nn.Identity()
    run, module, data, queries = work_of(module)
    module.train()
    module.net[2].eval()
    before = state(module)
    attribution = AttributionModule(module, run, Unrolled())
    if draws:
        with pytest.raises(
            UnsupportedTrainingError, match="does not hold the states of the random"
        ):
            attribution.attribute(data, queries, trainer=quiet())
    else:
        attribution.plan(data, queries, trainer=quiet())
        require_same_state(dict(before), state(module))
        scores = attribution.attribute(data, queries, trainer=quiet())
        assert scores.provenance["certificate"]["bit_equal"]
    require_same_state(before, state(module))


class Failing(AttributionTask):
    def __init__(self, after: int) -> None:
        self._left = after

    def train_loss(self, module, batch):
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("the disk is on fire")
        return logits_loss(module, batch)


@pytest.mark.parametrize("after", [0, 3, 8])
def test_the_module_is_left_as_it_was_after_an_error(work, after, tmp_path) -> None:
    run, module, data, queries = work
    before, path = state(module), tmp_path / "scores.h5"
    attribution = AttributionModule(module, run, TracIn(), Failing(after))
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        attribution.attribute(data, queries, 2, trainer=quiet(), scores_path=str(path))
    require_same_state(before, state(module))
    assert list(tmp_path.iterdir()) == []


def test_a_task_of_its_own_is_the_training_step(work) -> None:
    run, module, data, queries = work
    for estimator in (TracIn(), InfluenceFunction(), Source(2), Source(1, curvature="exact")):
        own, told = (
            AttributionModule(module, dataclasses.replace(run, curvature={}), estimator, task)
            for task in (None, ClassificationTask())
        )
        own, told = (
            one.attribute(data, queries, trainer=quiet(), self_influence=True)
            for one in (own, told)
        )
        torch.testing.assert_close(own.values, told.values)
        torch.testing.assert_close(own.self_influence, told.self_influence)


class Nested(Dataset):
    def __init__(self, data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        inputs, label = self.data[index]
        return {"features": {"x": inputs, "twice": [inputs * 2]}, "label": label, "name": "a b"}


class NestedModule(nn.Module):
    def __init__(self, net) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch):
        features = batch["features"]
        return self.net((features["x"] + features["twice"][0]) / 3)


class NestedTask(AttributionTask):
    def train_loss(self, module, batch):
        return F.cross_entropy(module(batch), batch["label"], reduction="none")


@pytest.mark.parametrize("estimator", [TracIn(), Source(1), Source(1, order="recorded")])
def test_nested_batches_of_dictionaries(work, estimator) -> None:
    run, module, data, queries = work
    expected = AttributionModule(module, run, estimator, _Plain()).attribute(
        data, queries, 4, trainer=quiet(), self_influence=True
    )
    nested = NestedModule(module.net)
    found = AttributionModule(nested, run, estimator, NestedTask()).attribute(
        Nested(data), Nested(queries), 4, trainer=quiet(), self_influence=True
    )
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.self_influence, expected.self_influence)


class _Plain(AttributionTask):
    def train_loss(self, module, batch):
        return logits_loss(module, batch)


def test_scores_streamed_to_a_file_are_those_in_memory(work, tmp_path: Path) -> None:
    run, module, data, queries = work
    for number, estimator in enumerate((TracIn(), InfluenceFunction(), Source(2))):
        attribution, path = AttributionModule(module, run, estimator), tmp_path / f"{number}.h5"
        options = {"trainer": quiet(), "self_influence": True}
        memory = attribution.attribute(data, queries, 4, **options)
        streamed = attribution.attribute(data, queries, 4, scores_path=str(path), **options)
        for scores in (streamed, Scores.load(path)):
            assert torch.equal(scores.values, memory.values)
            assert torch.equal(scores.self_influence, memory.self_influence)
            assert (scores.by_segment is None) == (memory.by_segment is None)
            if memory.by_segment is not None:
                assert torch.equal(scores.by_segment, memory.by_segment)
            assert scores.provenance["estimator"] == type(estimator).__name__
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.h5", "1.h5", "2.h5"]


def test_an_existing_scores_file_is_kept_unless_asked(work, tmp_path: Path) -> None:
    run, module, data, queries = work
    path = tmp_path / "scores.h5"
    attribution = AttributionModule(module, run, TracIn())
    attribution.attribute(data, queries, trainer=quiet(), scores_path=str(path))
    before = hashlib.sha256(path.read_bytes()).digest()
    calls: list[int] = []
    trainer = quiet()
    trainer.predict = lambda *_, **__: calls.append(1)  # type: ignore[method-assign]
    with pytest.raises(FileExistsError, match=r"scores\.h5 exists and is kept.*overwrite=True"):
        attribution.attribute(data, queries, trainer=trainer, scores_path=str(path))
    assert calls == []  # refused before the work
    assert hashlib.sha256(path.read_bytes()).digest() == before
    # A replacement that fails leaves the old file whole.
    failing = AttributionModule(module, run, TracIn(), Failing(5))
    with pytest.raises(RuntimeError, match="on fire"):
        failing.attribute(data, queries, 2, quiet(), scores_path=str(path), overwrite=True)
    assert hashlib.sha256(path.read_bytes()).digest() == before
    AttributionModule(module, run, InfluenceFunction()).attribute(
        data, queries, trainer=quiet(), scores_path=str(path), overwrite=True
    )
    assert Scores.load(path).provenance["estimator"] == "InfluenceFunction"
    assert list(tmp_path.iterdir()) == [path]


def test_a_users_trainer_keeps_its_settings(work) -> None:
    run, module, data, queries = work
    expected = AttributionModule(module, run, Source(1)).attribute(data, queries, trainer=quiet())
    trainer = quiet(inference_mode=True)
    found = AttributionModule(module, run, Source(1)).attribute(data, queries, trainer=trainer)
    assert torch.equal(found.values, expected.values)
    assert trainer.predict_loop.inference_mode
    with torch.no_grad():
        found = AttributionModule(module, run, Source(1)).attribute(data, queries, trainer=quiet())
    assert torch.equal(found.values, expected.values)


def test_a_module_of_other_parameters_is_refused_by_name(work) -> None:
    run = work[0]
    other = Classifier()
    other.net[4] = nn.Linear(4, 3).double()
    other.net[1] = nn.Identity()
    with pytest.raises(TrajectoryMismatchError) as raised:
        AttributionModule(other, run, TracIn())
    message = str(raised.value)
    assert "recorded but not in the module: net.1.weight, net.1.bias" in message
    assert "net.4.weight ([2, 4] recorded, [3, 4] in the module)" in message
    assert "Build the module as it was trained" in message


def test_other_data_is_refused(work) -> None:
    run, module, data, queries = work
    attribution = AttributionModule(module, run, TracIn())
    shorter = TensorDataset(*data[:9])
    with pytest.raises(TrajectoryMismatchError, match="expected 10 examples, got 9. Pass the"):
        attribution.attribute(shorter, queries, trainer=quiet())
    facts = dataclasses.replace(run.facts, fingerprint=fingerprint(data))
    attribution = AttributionModule(module, dataclasses.replace(run, facts=facts), TracIn())
    attribution.attribute(data, queries, trainer=quiet())
    inputs, labels = (tensor.clone() for tensor in data.tensors)
    labels[3] = 1 - labels[3]
    inputs[7] += 1e-9
    with pytest.raises(TrajectoryMismatchError, match="2 differ, at indices 3, 7"):
        attribution.attribute(TensorDataset(inputs, labels), queries, trainer=quiet())


@pytest.mark.parametrize("estimator", [TracIn(), InfluenceFunction(), Source(1)])
@pytest.mark.parametrize("which", ["training", "query"])
def test_losses_that_are_not_finite_name_their_example(work, which, estimator, tmp_path) -> None:
    run, module, data, queries = work
    bad = data if which == "training" else queries
    bad.tensors[0][2, 1] = float("nan")
    path = tmp_path / "scores.h5"
    with pytest.raises(NonFiniteError, match="loss of example 2 is nan"):
        AttributionModule(module, run, estimator).attribute(
            data, queries, 2, trainer=quiet(), scores_path=str(path)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (TracIn(), "score of query 0 for training example 2 is nan"),
        (InfluenceFunction(), r"curvature of net.0 at steps \[6\] is not finite"),
        (Source(2, curvature="exact"), r"all parameters at steps \[2\] is not finite"),
    ],
)
def test_gradients_that_are_not_finite_are_refused(work, estimator, message) -> None:
    """An infinite input that saturates what follows: a finite loss without a gradient."""
    run, module, data, queries = work
    data.tensors[0][2, 1] = float("inf")
    with pytest.raises(NonFiniteError, match=message):
        AttributionModule(module, run, estimator).attribute(data, queries, 2, trainer=quiet())
    assert not run.curvature


def test_settings_that_the_run_cannot_serve(work) -> None:
    run, module, data, queries = work

    def scores(estimator, train=data, query=queries, **options):
        attribution = AttributionModule(module, run, estimator, **options)
        return attribution.attribute(train, query, trainer=quiet())

    with pytest.raises(ValueError, match=r"holds no checkpoint: asked for 5 segments, recorded"):
        scores(Source(5))
    with pytest.raises(ValueError, match="strictly between 0 and 6"):
        scores(Source(segment_steps=[4, 9]))
    with pytest.raises(ValueError, match="query set is empty"):
        scores(TracIn(), query=TensorDataset(torch.zeros(0, 3), torch.zeros(0).long()))
    with pytest.raises(ValueError, match="training set is empty"):
        scores(TracIn(), train=TensorDataset(torch.zeros(0, 3), torch.zeros(0).long()))
    with pytest.raises(TypeError, match="must be a map-style Dataset"):
        scores(TracIn(), train=iter([]))
    with pytest.raises(ValueError, match="selects no trained parameter"):
        scores(TracIn(), task=ClassificationTask(layers=["head"]))
    found = scores(TracIn())
    with pytest.raises(ValueError, match=r"k.*11.*10|10.*11"):
        found.proponents(0, k=11)


@pytest.mark.parametrize("label", [2, -1])
def test_labels_out_of_range_are_refused(work, label) -> None:
    run, module, data, queries = work
    queries.tensors[1][1] = label
    attribution = AttributionModule(module, run, TracIn(), ClassificationTask())
    with pytest.raises(ValueError, match=rf"(?i)label.*{label}"):
        attribution.attribute(data, queries, trainer=quiet())


@pytest.mark.parametrize("estimator", [Source(1), Source(1, order="recorded"), Unrolled()])
def test_an_unsupported_optimizer_names_the_supported_ones(estimator: Any, work) -> None:
    run, module, data, queries = work
    run = dataclasses.replace(run, facts=dataclasses.replace(run.facts, optimizer="NAdam"))
    attribution = AttributionModule(module, run, estimator)
    with pytest.raises(UnsupportedTrainingError, match="trained with NAdam.*SGD, Adam, AdamW"):
        attribution.attribute(data, queries, trainer=quiet())


def test_adam_without_its_state_is_refused() -> None:
    run, module, data = train(MLP, OPTIMIZERS["adam"])
    bare = {s: dataclasses.replace(c, optimizer=None) for s, c in run.checkpoints.items()}
    run = dataclasses.replace(run, checkpoints=bare)
    for order in ("average", "recorded"):
        with pytest.raises(UnsupportedTrainingError, match="save_optimizer=True"):
            attribute(MLP, run, module, data, Source(1, order=order))


def test_impossible_estimators_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="Unknown curvature 'full': expected one of exact, ekfac"):
        Source(curvature="full")
    with pytest.raises(ValueError, match="order must be one of average, recorded, got 'random'"):
        Source(order="random")
    with pytest.raises(ValueError, match="num_segments must be at least 1, got 0"):
        Source(num_segments=0)
    with pytest.raises(ValueError, match="damping must not be negative, got -1"):
        InfluenceFunction(damping=-1)
    with pytest.raises(ValueError, match="not both"):
        InfluenceFunction(damping=1.0, relative_damping=0.1)


def test_exact_curvature_of_a_large_model_is_refused(monkeypatch) -> None:
    run, module, data = train(MLP, OPTIMIZERS["sgd"])
    monkeypatch.setattr("tda_lightning.curvature.fit.MAX_EXACT", 19)
    with pytest.raises(ValueError, match="20 x 20 numbers.*Use curvature='ekfac'"):
        attribute(MLP, run, module, data, Source(1, curvature="exact"))


def test_a_singular_inverse_is_refused() -> None:
    run, module, data = train(MLP, OPTIMIZERS["sgd"])
    data = (torch.zeros_like(data[0]), data[1])
    with pytest.raises(ValueError, match="singular and damping is 0"):
        attribute(MLP, run, module, data, InfluenceFunction("ekfac", damping=0.0))


class Absolute(AttributionTask):
    """No second derivative, and said to be sampled all the same."""

    def train_loss(self, module, batch):
        return F.l1_loss(module(batch[0]), batch[1], reduction="none").mean(1)

    def sampled_loss(self, module, batch):
        return sampled_gauss_newton_loss(self, module, batch)


def test_without_any_curvature_relative_damping_is_refused() -> None:
    run, module, data = train(MLP, OPTIMIZERS["sgd"])
    attribution = AttributionModule(module, run, InfluenceFunction(), Absolute())
    with pytest.raises(ValueError, match="no curvature in any layer.*absolute number"):
        attribution.attribute(TensorDataset(*data), TensorDataset(*data), trainer=quiet())


class Beside(nn.Module):
    """A model, and a layer that its loss never reaches."""

    def __init__(self, used: nn.Module) -> None:
        super().__init__()
        self.used, self.beside = used, nn.Linear(2, 2).double()

    def forward(self, inputs):
        return self.used(inputs) + self.beside(inputs[:, :2]).sum() * 0


def test_a_layer_that_the_loss_never_reaches_changes_no_influence() -> None:
    (plain, beside), data, queries = _twins(), CLASSIFIER.batch(10), queries_of(CLASSIFIER)
    found = []
    for module in (plain, beside):
        run = oracles.record_run(
            module,
            logits_loss,
            data,
            lambda m: torch.optim.SGD(m.parameters(), 0.1),
            oracles.cut_batches(10, 5, epochs=3),
            (2, 6),
        )
        found.append(
            AttributionModule(module, run, InfluenceFunction(), ClassificationTask()).attribute(
                TensorDataset(*data), TensorDataset(*queries), trainer=quiet()
            )
        )
    torch.testing.assert_close(found[1].values, found[0].values, rtol=1e-12, atol=0)
    assert any("no curvature in beside" in note for note in found[1].provenance["notes"])


def _twins() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return plain, Beside(copy.deepcopy(plain))


def test_no_standard_loss_means_the_empirical_fisher_and_says_so(work) -> None:
    run, module, data, queries = work
    scores = AttributionModule(module, run, Source(1), _Plain()).attribute(
        data, queries, trainer=quiet()
    )
    assert "empirical Fisher" in scores.provenance["fisher"]


def test_restricted_layers_leave_the_others_out() -> None:
    run, module, data = train(CLASSIFIER, OPTIMIZERS["sgd"])
    task = CaseTask("classification")
    whole = attribute(CLASSIFIER, run, module, data, TracIn(), task=task)
    parts = []
    for layer in ("0", "2"):
        task = CaseTask("classification")
        task.layers = [layer]
        parts.append(attribute(CLASSIFIER, run, module, data, TracIn(), task=task).values)
    torch.testing.assert_close(whole.values, parts[0] + parts[1])


def test_columns_follow_the_index_whatever_the_loader(work) -> None:
    run, module, data, queries = work
    attribution = AttributionModule(module, run, TracIn())
    expected = attribution.attribute(data, queries, trainer=quiet())
    loader = DataLoader(data, 3, shuffle=True, drop_last=True, num_workers=1)
    found = attribution.attribute(loader, DataLoader(queries, 1), trainer=quiet())
    torch.testing.assert_close(found.values, expected.values)


def test_check_compares_the_engine_with_autograd(work, capsys, monkeypatch) -> None:
    run, module, data, queries = work
    before = state(module)
    attribution = AttributionModule(module, run, TracIn())
    errors = attribution.check(data, queries)
    assert set(errors) == {"net.0", "net.1", "net.4"}
    assert max(errors.values()) < 1e-12
    printed = capsys.readouterr().out
    assert "largest relative error" in printed and "net.4" in printed
    original = GradientEngine.gradients

    def broken(self, loss, batch, examples):
        found = original(self, loss, batch, examples)
        found.blocks["net.4"].outputs[-1] *= 1.001
        return found

    monkeypatch.setattr(GradientEngine, "discover", _discover_before(broken))
    errors = attribution.check(data, queries)
    assert errors["net.4"] == pytest.approx(1e-3, rel=1e-3)
    assert errors["net.0"] < 1e-12
    require_same_state(before, state(module))


def _discover_before(broken):
    """The first batch is seen by a sound engine, what follows by a broken one."""
    original = GradientEngine.discover

    def discover(self, *args):
        found = original(self, *args)
        self.gradients = broken.__get__(self)
        return found

    return discover
