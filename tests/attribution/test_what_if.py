"""Scores at weights below 1: the derivative of weighted retraining, at those weights."""

from __future__ import annotations

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Ensemble, Scores, Trajectory
from tda_lightning.edits import Removal
from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.evaluation import measure, retrain
from tda_lightning.records.errors import (
    NonFiniteError,
    TrajectoryMismatchError,
    UnsupportedTrainingError,
)
from tda_lightning.records.trajectory import Trajectory as Run
from tda_lightning.replay import what_if as what_if_module
from tda_lightning.replay.expected_squares import signs
from tda_lightning.replay.measured import MeasuredWalk
from tda_lightning.replay.run import Walk
from tda_lightning.replay.what_if import subset_weights
from tda_lightning.solvers import ASTRA, ConjugateGradients, DataInf, Direct, Lanczos, LiSSA
from tda_lightning.store.inspect import describe
from tda_lightning.store.writer import TrajectoryWriter
from tda_lightning.tasks import AttributionTask
from tests import oracles
from tests.attributing import CaseTask, attribute, quiet, relative
from tests.cases.training import CLASSIFIER, LINEAR, MLP, OPTIMIZERS, queries_of, train
from tests.oracles.estimators import spread
from tests.quick import quick
from tests.runs import Net, Numbered, fit, loader
from tests.unrolling import NETWORKS, adam, mostly, record, scores_of, sgd

SIZE = 10


def weights_of(keep: float, draws: int) -> Tensor:
    """[run, train]."""
    if not draws:
        return torch.full((1, SIZE), keep, dtype=torch.float64)
    return subset_weights(SIZE, keep, draws)


def what_if(run: Run) -> list[Run]:
    return list(run.what_if.values())


# The derivative


@pytest.mark.parametrize("draws", [0, 1, 3])
@pytest.mark.parametrize("name", ["decay", "momentum", "nesterov", "groups", "adam", "adamw"])
def test_unrolling_is_the_derivative_at_those_weights(name: str, draws: int) -> None:
    """Against autograd through the weighted training."""
    # Adam gives no derivative to what has not moved: no first gradient must be 0.
    batches = [[[*range(SIZE)]], *oracles.cut_batches(SIZE, 4, epochs=3)]
    run, module, data = train(MLP, OPTIMIZERS[name], batches=batches, checkpoints=(3, 6))
    scores = attribute(MLP, run, module, data, Unrolled(), keep=0.6, draws=draws)
    expected = [
        oracles.unrolled(run, module, MLP.loss, data, MLP.loss, queries_of(MLP), weights)
        for weights in weights_of(0.6, draws)
    ]
    assert relative(scores.values, torch.stack(expected).mean(0)) < 1e-8
    at_one = attribute(MLP, run, module, data, Unrolled())
    assert relative(at_one.values, scores.values) > 1e-2  # it is another question
    if draws > 1:
        assert relative(scores.member(1).values, expected[1]) < 1e-8


# An example of weight 0 in the first batch that reaches hidden units (ReLU) which no other example
# of the batch does: their weights have not moved yet, and Adam gives no derivative to what has not
# (docs/methods.md, "Optimizers"). With the derivative 1 / eps there its score would agree to 2e-4.
ALONE = ("transformer", "adamw", 3)
SMOOTH = {
    "momentum": sgd(lr=0.1, momentum=0.8, weight_decay=0.05),
    "adamw": adam(torch.optim.AdamW, weight_decay=0.1, eps=1e-3),
}


@pytest.mark.parametrize("draws", [0, 1])
@pytest.mark.parametrize(
    ("network", "name"),
    mostly(NETWORKS, ["momentum", "adamw"], [("batch norm", "momentum"), ("dropout", "adamw")]),
)
def test_central_differences_of_weighted_retraining(
    network: str, name: str, draws: int, tmp_path: Path
) -> None:
    """Of runs in train mode: dropout, batch statistics, sequences, shared weights."""
    kind = NETWORKS[network]
    run, module, data = record(tmp_path, kind, SMOOTH[name])
    queries = kind.data(3, seed=5)
    scores = scores_of(run, module, data, queries, kind.task, keep=0.5, draws=draws)
    (weights,) = weights_of(0.5, draws)

    def measured(n: int, step: float) -> Tensor:
        changed = weights.clone()
        changed[n] += step
        state = retrain(run, module, kind.task, data, changed)
        return measure(module, kind.task, state, queries)

    step = 2e-5
    for n in (0, 3, 8):
        if draws and (network, name, n) == ALONE:
            continue
        # Of fourth order: its error is far below what is asked of the scores.
        near = (measured(n, step) - measured(n, -step)) / (2 * step)
        far = (measured(n, 2 * step) - measured(n, -2 * step)) / (4 * step)
        expected = -(4 * near - far) / 3
        assert relative(scores.values[:, n], expected) < 1e-6


@pytest.mark.parametrize(("keep", "kept"), [(0.97, 10), (0.04, 0)])
def test_a_subset_leaves_some_out_and_keeps_some(keep: float, kept: int) -> None:
    """With nothing left out it would be the recorded run, under the name of another question."""
    run, module, data = train(MLP, OPTIMIZERS["momentum"], checkpoints=(3,))
    with pytest.raises(ValueError, match=f"keeps {kept} of 10 training .* Ask with draws=0"):
        attribute(MLP, run, module, data, TracIn(), keep=keep, draws=2)
    attribute(MLP, run, module, data, TracIn(), keep=keep, draws=0)


# The other estimators


@pytest.mark.parametrize("draws", [0, 1])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_dense_formulas_on_the_what_if_run(name: str, draws: int) -> None:
    """Its checkpoints, and curvature of the weighted loss; an example's own gradient counts by 1
    whatever its weight."""
    run, module, data = train(CLASSIFIER, OPTIMIZERS[name], checkpoints=(3, 6, 9))
    question: dict[str, Any] = {"keep": 0.5, "draws": draws}
    scores = attribute(CLASSIFIER, run, module, data, TracIn(), **question)
    (made,) = what_if(run)
    (weights,) = weights_of(0.5, draws)
    end = oracles.replay(run, module, CLASSIFIER.loss, data, weights)
    for parameter, own in end.items():
        assert relative(made.checkpoints[9].parameters[parameter], own.detach()) < 1e-9
    steps = [3, 6, 9]
    gradients = oracles.checkpoint_gradients(made, module, CLASSIFIER.loss, data, steps)
    queries = oracles.checkpoint_gradients(
        made, module, CLASSIFIER.loss, queries_of(CLASSIFIER), steps
    )
    assert relative(scores.by_segment, oracles.tracin(made, gradients, queries)) < 1e-9

    names = list(run.facts.parameters)
    curvature = {
        step: oracles.gauss_newton(
            oracles.with_state(module, made.checkpoints[step]),
            CLASSIFIER.criterion,
            data,
            names,
            weights,
        )
        for step in steps
    }
    scores = attribute(
        CLASSIFIER, run, module, data, InfluenceFunction("exact", damping=0.1), **question
    )
    decay = spread(made, made.steps.hyperparameters["weight_decay"][-1])
    expected = oracles.influence(curvature[9], decay, 0.1, gradients[9], queries[9])
    assert relative(scores.values, expected) < 1e-9

    estimator = Source(segment_steps=[6], curvature="exact")
    segments = made.segments([6])
    means = [
        torch.stack([curvature[step] for step in segment.checkpoints]).mean(0)
        for segment in segments
    ]
    scores = attribute(CLASSIFIER, run, module, data, estimator, **question)
    expected = oracles.source_average(made, segments, means, gradients, queries[9])
    assert relative(scores.by_segment, expected) < 1e-9


SOLVED = {"damping": 0.3}
ESTIMATORS: dict[str, Any] = {
    "ekfac": InfluenceFunction("ekfac", **SOLVED),
    "kfac": InfluenceFunction("kfac", **SOLVED),
    "diagonal": InfluenceFunction("diagonal", **SOLVED),
    "relative damping": InfluenceFunction("ekfac", relative_damping=0.1),
    "cg": InfluenceFunction(solver=ConjugateGradients(tolerance=1e-10), **SOLVED),
    "direct": InfluenceFunction(solver=Direct(), **SOLVED),
    "lanczos": InfluenceFunction(solver=Lanczos(), **SOLVED),
    "lissa": InfluenceFunction(solver=LiSSA(scale=3.0, batch=12, depth=40), **SOLVED),
    "astra": InfluenceFunction(solver=ASTRA(iterations=30, batch=12, step=1.0), **SOLVED),
    "source": Source(2),
    "leading directions": Source(2, leading_directions=8),
    "recorded": Source(2, order="recorded"),
}


@pytest.mark.parametrize("name", quick(ESTIMATORS, set(ESTIMATORS) - {"kfac", "lanczos", "direct"}))
def test_a_weight_is_a_factor_of_the_loss(name: str) -> None:
    """Estimators see a what-if run as they see a run of a loss that was scaled by hand."""
    optimizer = OPTIMIZERS["adamw" if name == "recorded" else "sgd"]
    run, module, data = train(CLASSIFIER, optimizer, checkpoints=(3, 6, 9))
    scores = attribute(CLASSIFIER, run, module, data, ESTIMATORS[name], keep=0.5, draws=0)
    (made,) = what_if(run)

    class Halved(CaseTask):
        def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
            return super().train_loss(module, batch) / 2

        def measurement(self, module: nn.Module, batch: Any) -> Tensor:
            return super().train_loss(module, batch)

        measures_loss = False

    halved = dataclasses.replace(made, data_weights=None, curvature={}, unfinished={})
    expected = attribute(
        CLASSIFIER, halved, module, data, ESTIMATORS[name], task=Halved("classification")
    )
    assert relative(scores.values, 2 * expected.values) < 1e-8


def test_datainf_weighs_the_gradients_of_a_what_if_run() -> None:
    """Against its formula, a mean over the examples of (D + w_n g_n g_n^T)^-1, by layer."""
    run, module, data = train(CLASSIFIER, OPTIMIZERS["sgd"], checkpoints=(9,))
    estimator = InfluenceFunction(solver=DataInf(), damping=0.3)
    scores = attribute(CLASSIFIER, run, module, data, estimator, keep=0.5, draws=1)
    (made,) = what_if(run)
    (weights,) = weights_of(0.5, 1)
    own = oracles.checkpoint_gradients(made, module, CLASSIFIER.loss, data, [9])[9]
    asked = oracles.checkpoint_gradients(made, module, CLASSIFIER.loss, queries_of(CLASSIFIER), [9])
    expected, at = torch.zeros(3, SIZE, dtype=torch.float64), 0
    for layer in (module[0], module[2]):
        size = sum(parameter.numel() for parameter in layer.parameters())
        g, v = own[:, at : at + size], asked[9][:, at : at + size]
        inverses = [
            torch.linalg.inv(0.3 * torch.eye(size).double() + w * torch.outer(row, row))
            for w, row in zip(weights, g, strict=True)
        ]
        expected += v @ torch.stack(inverses).mean(0) @ g.T / SIZE
        at += size
    assert relative(scores.values, expected) < 1e-9


# Expected second moments

NORMALISING = {
    "adam": adam(weight_decay=0.1),
    "adamw": adam(torch.optim.AdamW, weight_decay=0.5),
    "rmsprop": lambda m: torch.optim.RMSprop(
        m.parameters(), 0.01, 0.8, momentum=0.6, centered=True, weight_decay=0.1
    ),
    "adagrad": lambda m: torch.optim.Adagrad(
        m.parameters(), 0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.01
    ),
    "adamw in groups": OPTIMIZERS["adamw_groups"],
}


@pytest.mark.parametrize("name", NORMALISING)
def test_the_derivative_with_expected_second_moments(name: str) -> None:
    """What random subsets add to the squares is a constant of the derivative."""
    batches = oracles.cut_batches(SIZE, 4, epochs=3, accumulate=2)
    run, module, data = train(
        MLP, NORMALISING[name], batches=batches, checkpoints=(2, 4), accumulation=2
    )
    scores = attribute(MLP, run, module, data, Unrolled(), keep=0.6)
    assert scores.provenance["what_if"]["weights"] == "expected"
    (weights,) = weights_of(0.6, 0)
    queries = queries_of(MLP)
    expected = oracles.unrolled(
        run, module, MLP.loss, data, MLP.loss, queries, weights, expected=True
    )
    assert relative(scores.values, expected) < 1e-8
    plain = attribute(MLP, run, module, data, Unrolled(), keep=0.6, draws=0)
    assert relative(plain.values, expected) > 1e-2


def test_an_optimizer_without_memory_of_squares_says_what_to_ask() -> None:
    run, module, data = train(MLP, adam(betas=(0.8, 0.0)), checkpoints=(3,))
    with pytest.raises(UnsupportedTrainingError, match="Ask with draws=4"):
        attribute(MLP, run, module, data, TracIn(), keep=0.5)
    attribute(MLP, run, module, data, TracIn(), keep=0.5, draws=0)


def test_the_recorded_order_knows_expected_second_moments() -> None:
    """Least squares with a checkpoint and a segment for every step: nothing is approximated."""
    batches = [[[*range(SIZE)]]] * 5
    make = adam(torch.optim.AdamW, weight_decay=0.1, eps=1e-4)
    run, module, data = train(LINEAR, make, batches=batches, checkpoints=range(6))
    estimator = Source(segment_steps=[1, 2, 3, 4], curvature="exact", order="recorded")
    scores = attribute(LINEAR, run, module, data, estimator, keep=0.6)
    (weights,) = weights_of(0.6, 0)
    expected = oracles.unrolled(
        run, module, LINEAR.loss, data, LINEAR.loss, queries_of(LINEAR), weights, expected=True
    )
    assert relative(scores.values, expected) < 1e-8


def test_signed_sums_estimate_what_random_subsets_add() -> None:
    """Over all signs, and over all subsets by their probabilities."""
    gradients = torch.randn(4, 7, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.2, 1.0, 0.7], dtype=torch.float64)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    chances = torch.where(every > 0, weights, 1 - weights).prod(1)
    by_subsets = (chances[:, None] * (every @ gradients).square()).sum(0)
    spread = (2 * every - 1) * (weights * (1 - weights)).sqrt()
    by_signs = (weights @ gradients).square() + (spread @ gradients).square().mean(0)
    assert relative(by_signs, by_subsets) < 1e-12
    drawn = torch.stack([signs(row, 0, 4)[0] for row in range(4000)])
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert float((drawn.T @ drawn / 4000 - torch.eye(4)).abs().max()) < 0.06
    assert torch.equal(signs(3, 1, 4), signs(3, 1, 4))
    # The optimizer averages over steps, of which the first ones have few before them.
    averaged = [len(signs(row, 0, 4)) for row in range(40)]
    assert all(sum(averaged[:steps]) >= 16 for steps in range(1, 41)) and averaged[-1] == 1


def test_edits_are_differences_of_gradients_at_those_weights() -> None:
    run, module, data = train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(3, 6))
    plain = attribute(CLASSIFIER, run, module, data, Unrolled(), keep=0.5)
    edits = [Removal(4), Removal(0)]
    scores = attribute(CLASSIFIER, run, module, data, Unrolled(), keep=0.5, edits=edits)
    assert relative(scores.values, plain.values[:, [4, 0]]) < 1e-12


# Where what-if runs are kept


QUESTIONS = [{"keep": 0.5}, {"keep": 0.8}, {"keep": 0.5, "draws": 2}]


@pytest.fixture
def recorded(tmp_path: Path) -> Any:
    """A run in a folder, with dropout and batch norm."""
    data = Numbered()
    fit(tmp_path / "run", lambda: loader(data, shuffle=True), recorder={"num_checkpoints": 3})
    return tmp_path / "run", Net(), data


def ask(recorded: Any, estimator: Any, **options: Any) -> Scores:
    folder, module, data = recorded
    attribution = AttributionModule(module, str(folder), estimator)
    return attribution.attribute(data, Numbered(3, seed=5), trainer=quiet(), **options)


def folders(recorded: Any) -> list[Path]:
    return sorted((recorded[0] / "what_if").iterdir())


def test_a_what_if_run_is_a_trajectory_that_estimators_share(recorded: Any) -> None:
    ask(recorded, TracIn(), keep=0.5)
    (folder,) = folders(recorded)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.h5")}
    made, run = Trajectory.load(folder), Trajectory.load(recorded[0])
    assert list(made.checkpoints) == list(run.checkpoints)
    assert made.data_weights is not None and (made.data_weights == 0.5).all()
    assert torch.equal(made.steps.examples, run.steps.examples)
    assert not torch.equal(made.steps.loss, run.steps.loss)
    description = describe(folder)
    assert not description.problems
    scores = ask(recorded, Unrolled(), keep=0.5)
    ask(recorded, InfluenceFunction(damping=0.1), keep=0.5, draws=0)
    assert folders(recorded) == [folder]
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert scores.provenance["certificate"]["bit_equal"]
    assert scores.provenance["trajectory"] == str(recorded[0])
    assert scores.provenance["what_if"] == {
        "keep": 0.5,
        "weights": "uniform",
        "rate": 1.0,
        "runs": [str(folder)],
    }
    assert "half of the training data were gone" in scores.provenance["question"]
    assert scores.provenance["sizes"].startswith("roughly predicted")
    at_one = ask(recorded, Unrolled())
    assert "what_if" not in at_one.provenance
    # The queries are measured on the model that people have.
    assert scores.provenance["measurements"] == at_one.provenance["measurements"]


def test_each_question_has_runs_of_its_own(recorded: Any) -> None:
    for question in QUESTIONS:
        ask(recorded, TracIn(), **question)
    assert len(folders(recorded)) == 4
    described = describe(recorded[0])
    assert sorted(run.name for run in described.what_if) == sorted(
        ["every example at weight 0.5", "every example at weight 0.8"] + 2 * ["a subset of 0.5"]
    )
    sizes = sum(run.size for run in described.what_if)
    assert 0 < sizes < described.size


def test_an_interrupted_run_resumes_at_its_last_checkpoint(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(recorded, TracIn(), keep=0.5)
    (folder,) = folders(recorded)
    end = Trajectory.load(folder)
    last, losses = end.last_step, end.steps.loss
    shutil.rmtree(folder)
    taken: list[int] = []
    measured_step = MeasuredWalk.measured_step

    def stopped(self: Any, row: int) -> None:
        taken.append(row)
        if len(taken) == 6:
            raise KeyboardInterrupt
        measured_step(self, row)

    monkeypatch.setattr(MeasuredWalk, "measured_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        ask(recorded, TracIn(), keep=0.5)
    stopped_at = Trajectory.load(folder).last_step
    assert 0 < stopped_at < last
    taken[:] = [-1] * 6

    def refused(*_: object) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryWriter, "resume", refused)
        with pytest.warns(match="what-if run is not kept: read-only"):
            unkept = ask(recorded, TracIn(), keep=0.5)
    assert torch.equal(unkept.values, whole.values)
    taken[:] = [-1] * 6
    again = ask(recorded, TracIn(), keep=0.5)
    assert taken[6:] == list(range(stopped_at, last))
    assert torch.equal(again.values, whole.values)
    assert torch.equal(Trajectory.load(folder).steps.loss, losses)


def test_all_that_determines_a_run_is_in_its_key(recorded: Any) -> None:
    folder, _, data = recorded
    ask(recorded, TracIn(), keep=0.5)

    class Other(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 2 * super().training_step(batch, batch_idx)

    ask((folder, Other(), data), TracIn(), keep=0.5)
    assert len(folders(recorded)) == 2


def test_a_folder_that_cannot_be_written_is_a_warning(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(recorded, TracIn(), keep=0.5)
    shutil.rmtree(recorded[0] / "what_if")

    def refused(self: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(what_if_module.FolderLock, "acquire", refused)
    with pytest.warns(UserWarning, match="the what-if run is not kept"):
        scores = ask(recorded, TracIn(), keep=0.5)
    assert torch.equal(scores.values, expected.values)


def test_a_full_disk_is_an_error_with_figures(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(OSError, match=r"what-if run: it takes about .* and 100 B are free"):
        ask(recorded, TracIn(), keep=0.5)


# Ensembles, stages, plans


def test_members_of_an_ensemble_are_replayed_each() -> None:
    batches = oracles.cut_batches(10, 4, epochs=3)
    trained = [
        train(CLASSIFIER, OPTIMIZERS["momentum"], batches=order, checkpoints=(3, 6, 9))
        for order in (batches, batches[::-1])
    ]
    _, module, data = trained[0]
    runs = [run for run, *_ in trained]
    for draws in (0, 2):
        question: dict[str, Any] = {"keep": 0.5, "draws": draws}
        alone = [attribute(CLASSIFIER, r, module, data, TracIn(), **question) for r in runs]
        values = torch.stack([scores.values for scores in alone])
        own = torch.stack([scores.self_influence for scores in alone])
        if draws:
            # The second member has the subsets after those of the first.
            question["draws"] = 2 * draws
            more = attribute(CLASSIFIER, runs[1], module, data, TracIn(), **question)
            values[1] = 2 * more.values - values[1]
            own[1] = 2 * more.self_influence - own[1]
            question["draws"] = draws
        attribution = AttributionModule(module, Ensemble(runs), TracIn(), CaseTask(CLASSIFIER.kind))
        both = attribution.attribute(
            TensorDataset(*data),
            TensorDataset(*queries_of(CLASSIFIER)),
            4,
            quiet(),
            **question,
        )
        assert relative(both.values, values.mean(0)) < 1e-12
        assert relative(both.self_influence, own.mean(0)) < 1e-12
        assert relative(both.spread, values.std(0) / 2**0.5) < 1e-9
        assert len(both.provenance["members"]) == 2


def test_a_plan_counts_the_training_of_what_if_runs(recorded: Any) -> None:
    folder, module, data = recorded
    attribution = AttributionModule(module, str(folder), TracIn())
    plan = attribution.plan(data, Numbered(3, seed=5), trainer=quiet(), keep=0.5, draws=3)
    first = plan.passes[0]
    assert first.title.startswith("what-if run") and first.count == 3 and first.seconds > 0
    assert not (folder / "what_if").exists()


# Bad input


def test_an_ensemble_of_a_normalising_optimizer_takes_shorter_steps() -> None:
    """It asks about training anew on less data, which has fewer steps."""
    runs = []
    for order in range(2):
        batches = oracles.cut_batches(10, 4, epochs=3, seed=order)
        run, module, data = train(MLP, OPTIMIZERS["adamw"], batches=batches, checkpoints=(3, 6, 9))
        runs.append(run)
    queries = TensorDataset(*queries_of(MLP))
    attribution = AttributionModule(module, Ensemble(runs), TracIn(), CaseTask(MLP.kind))
    scores = attribution.attribute(TensorDataset(*data), queries, 4, quiet(), keep=0.5)
    assert scores.provenance["what_if"]["rate"] == 0.5
    assert "0.5 times the rates" in scores.provenance["question"]
    for run in runs:
        (made,) = what_if(run)
        assert torch.equal(made.steps.learning_rate, run.steps.learning_rate / 2)


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, float("nan")])
def test_a_share_is_above_zero_and_at_most_one(keep: float, recorded: Any) -> None:
    with pytest.raises(ValueError, match="keep is the share"):
        ask(recorded, TracIn(), keep=keep)


def test_a_file_of_scores_that_is_there_is_refused_before_training(
    recorded: Any, tmp_path: Path
) -> None:
    (tmp_path / "scores.h5").touch()
    with pytest.raises(FileExistsError, match=r"scores\.h5 exists and is kept"):
        ask(recorded, TracIn(), keep=0.5, scores_path=str(tmp_path / "scores.h5"))
    assert not (recorded[0] / "what_if").exists()


def test_a_run_that_cannot_be_replayed_remains_with_keep_1(tmp_path: Path) -> None:
    fit(tmp_path / "run", precision="bf16-mixed")
    recorded = tmp_path / "run", Net(), Numbered()
    with pytest.raises(UnsupportedTrainingError, match=r"precision=.*keep=1"):
        ask(recorded, TracIn(), keep=0.5)
    ask(recorded, TracIn(), keep=1)


def test_a_task_that_is_not_the_trained_loss_is_refused(recorded: Any) -> None:
    folder, module, data = recorded

    class Doubled(AttributionTask):
        def train_loss(self, module: Any, batch: Any) -> Tensor:
            x, y, _ = batch
            return 2 * (module.net(x) - y).square().mean(1)

    attribution = AttributionModule(module, str(folder), TracIn(), Doubled())
    with pytest.raises(TrajectoryMismatchError, match="A what-if run needs the very loss"):
        attribution.attribute(data, Numbered(3), trainer=quiet(), keep=0.5)


def test_a_run_that_diverges_says_so(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Walk.step

    def diverged(self: Any, row: int, weights: Any = None) -> Any:
        loss, draws = step(self, row, weights)
        return (float("nan") if row == 4 else loss), draws

    monkeypatch.setattr(Walk, "step", diverged)
    with pytest.raises(NonFiniteError, match="diverged: the loss of step 5"):
        ask(recorded, TracIn(), keep=0.5)


def test_a_what_if_run_is_not_asked_what_if(recorded: Any) -> None:
    ask(recorded, TracIn(), keep=0.5)
    (folder,) = folders(recorded)
    again = folder, *recorded[1:]
    at_half = ask(again, TracIn())
    assert relative(at_half.values, ask(recorded, TracIn(), keep=0.5).values) < 1e-12
    with pytest.raises(UnsupportedTrainingError, match="has weights on its examples already"):
        ask(again, TracIn(), keep=0.5)


def test_subsets_leave_every_example_out_equally_often() -> None:
    assert (subset_weights(10, 0.5, 4).sum(0) == 2).all()
    assert (subset_weights(10, 0.8, 5).sum(0) == 4).all()
    assert (subset_weights(10, 0.8, 5).sum(1) == 8).all()
    assert torch.equal(subset_weights(10, 0.7, 2), subset_weights(10, 0.7, 5)[:2])
    left_out = 11 - subset_weights(11, 0.6, 9).sum(0)
    assert left_out.max() - left_out.min() <= 1
