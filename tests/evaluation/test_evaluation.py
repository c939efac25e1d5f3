"""Retraining, the linear datamodeling score, and the other judgements of scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.estimators import Source
from tda_lightning.evaluation import (
    agreement,
    as_removal,
    detection_auc,
    difference,
    draw_subsets,
    landing_error,
    leave_one_out,
    linear_datamodeling_score,
    measure,
    retrain,
    retrain_each,
)
from tda_lightning.records.errors import (
    NonFiniteError,
    TrajectoryMismatchError,
    UnsupportedTrainingError,
)
from tda_lightning.tasks import AttributionTask, ClassificationTask, RegressionTask
from tests import oracles
from tests import runs as recorded
from tests.cases.training import CLASSIFIER, OPTIMIZERS, queries_of, schedule, train


class Squares(AttributionTask):
    """The loss of the recorded test runs: squared error over the batch's outputs."""

    def train_loss(self, module: nn.Module, batch) -> torch.Tensor:
        return (module.net(batch[0]) - batch[1]).square().mean(1)


def small(name: str = "momentum", **options):
    """A run by the oracles' own loop, in eval mode and float64."""
    run, module, data = train(CLASSIFIER, OPTIMIZERS[name], schedule=schedule, **options)
    return run, module.eval(), ClassificationTask(), TensorDataset(*data)


# Retraining


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replay_lands_on_the_recorded_end(name, clip_norm) -> None:
    """With accumulation and an incomplete last group, one by one and stacked."""
    batches = oracles.cut_batches(10, 3, epochs=2, accumulate=2)
    work = small(name, batches=batches, accumulation=2, clip_norm=clip_norm)
    settings = {"gradient_clip_val": clip_norm}
    run = dataclasses.replace(work[0], facts=dataclasses.replace(work[0].facts, settings=settings))
    assert landing_error(run, retrain(run, *work[1:], torch.ones(10))) < 1e-12
    for state in retrain_each(run, *work[1:], torch.ones(2, 10), together=2):
        assert landing_error(run, state) < 1e-12


@pytest.mark.parametrize("name", ["momentum", "adamw_groups"])
def test_weighted_replay_is_the_oracles(name) -> None:
    run, module, task, data = small(name)
    weights = torch.tensor([1, 0, 1, 0.5, 1, 1, 0, 1, 1, 2.0]).double()
    expected = oracles.replay(run, module, CLASSIFIER.loss, data.tensors, weights)
    found = retrain(run, module, task, data, weights)
    (stacked,) = retrain_each(run, module, task, data, weights[None], together=4)
    for parameter, tensor in expected.items():
        torch.testing.assert_close(found[parameter], tensor, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(stacked[parameter], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizers", [recorded.scheduled, recorded.adamw])
def test_replay_of_a_lightning_run_is_bit_for_bit(optimizers, tmp_path) -> None:
    """Batch statistics included; the module is put back as it was."""
    module = recorded.Net(optimizers)
    module.net[3].p = 0.0
    recorded.fit(tmp_path / "run", module=module, accumulate_grad_batches=2)
    run = Trajectory.load(str(tmp_path / "run"))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    state = retrain(run, module, Squares(), recorded.Numbered(), torch.ones(22))
    end = run.checkpoints[run.last_step]
    for name, tensor in {**end.parameters, **end.buffers}.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-7)
    assert landing_error(run, state) < 1e-6
    if optimizers is recorded.scheduled:
        # Not so for Adam: the bias before a BatchNorm has a gradient of rounding errors alone,
        # which Adam makes as large as any other.
        work = (run, module, Squares(), recorded.Numbered(), torch.ones(1, 22))
        (stacked,) = retrain_each(*work, together=3)
        for name, tensor in {**end.parameters, **end.buffers}.items():
            torch.testing.assert_close(stacked[name], tensor, rtol=1e-5, atol=1e-6)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [part.training for part in module.modules()] == modes


def test_replay_through_training_step_and_a_loader(tmp_path) -> None:
    class Plain(recorded.Net):
        def training_step(self, batch, batch_idx):
            self.log("loss", 0.0)
            return F.mse_loss(self.net(batch[0]), batch[1])

    module = Plain()
    module.net[3].p = 0.0
    recorded.fit(tmp_path / "run", module=module)
    run = Trajectory.load(str(tmp_path / "run"))
    loader = DataLoader(recorded.Numbered(), batch_size=4)
    weights = draw_subsets(22, 0.9, count=1)[0].float()
    assert landing_error(run, retrain(run, module, None, loader, torch.ones(22))) < 1e-6
    found = retrain(run, module, None, loader, weights)
    expected = retrain(run, module, Squares(), loader, weights)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_dropout_is_replayed_from_the_recorded_states(tmp_path) -> None:
    """Augmentation by all three generators too; the caller's own draws are left alone."""
    data = recorded.Numbered(augment=True)
    train = lambda: recorded.loader(data, shuffle=True)  # noqa: E731
    module = recorded.fit(tmp_path / "run", train)
    run = Trajectory.load(str(tmp_path / "run"))
    before = torch.get_rng_state()
    state = retrain(run, module, None, data, torch.ones(22))
    assert landing_error(run, state) < 1e-6
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_without_recorded_states_cannot_be_replayed(tmp_path) -> None:
    module = recorded.fit(tmp_path / "run")
    run = Trajectory.load(str(tmp_path / "run"))
    settings = {**run.facts.settings, "random": "absent: several processes"}
    run = dataclasses.replace(run, facts=dataclasses.replace(run.facts, settings=settings))
    work = (run, module, Squares(), recorded.Numbered(), torch.ones(22))
    with pytest.raises(UnsupportedTrainingError, match="draws random numbers"):
        retrain(*work)
    retrain(*work, training=False)


def test_bad_replays_are_refused() -> None:
    run, module, task, data = small()
    with pytest.raises(ValueError, match=r"shape \[runs, 10\]"):
        retrain(run, module, task, data, torch.ones(9))
    with pytest.raises(ValueError, match=r"at least one run.*got \[0, 10\]"):
        list(retrain_each(run, module, task, data, torch.ones(0, 10), together=2))
    with pytest.raises(TrajectoryMismatchError, match="expected 10 examples, got 9"):
        retrain(run, module, task, TensorDataset(*data[:9]), torch.ones(9))
    with pytest.raises(NonFiniteError, match="diverged"):
        retrain(run, module, task, data, torch.full((10,), float("inf")))
    mixed = dataclasses.replace(run.facts, settings={"precision": "16-mixed"})
    with pytest.raises(UnsupportedTrainingError, match="16-mixed"):
        retrain(dataclasses.replace(run, facts=mixed), module, task, data, torch.ones(10))
    steps = dataclasses.replace(run.steps, examples=torch.empty(0, dtype=torch.int64))
    with pytest.raises(UnsupportedTrainingError, match="no example indices"):
        retrain(dataclasses.replace(run, steps=steps), module, task, data, torch.ones(10))


# Linear datamodeling score


def test_lds_is_the_mean_of_spearmans_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 12, generator=generator)
    subsets = draw_subsets(12, 0.5, count=9, seed=3)
    outcomes = torch.randn(9, 2, 4, generator=generator)
    found = linear_datamodeling_score(Scores(scores), subsets, outcomes)
    for query in range(4):
        kept = [float(scores[query][subset].sum()) for subset in subsets]
        expected = spearmanr(kept, -outcomes.mean(1)[:, query]).statistic
        assert float(found.per_query[query]) == pytest.approx(expected)
    assert found.value == pytest.approx(float(found.per_query.mean()))
    assert found.low < found.value < found.high
    assert difference(found, found).value == 0
    again = linear_datamodeling_score(Scores(scores), subsets, outcomes)
    assert str(again) == str(found)


def test_the_interval_covers_the_mean_of_the_queries() -> None:
    """95% intervals from samples of a known distribution hold its mean about that often."""
    from tda_lightning.evaluation.linear_datamodeling import bootstrap

    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(300, 40, generator=generator)
    found = [bootstrap(row, resamples=400) for row in samples]
    covered = sum(item.low <= 0.5 <= item.high for item in found) / len(found)
    assert 0.9 < covered < 0.98


def test_constant_rows_say_or_ask_nothing() -> None:
    subsets = draw_subsets(6, 0.5, count=5)
    outcomes = torch.stack([torch.arange(5.0), torch.zeros(5), torch.arange(5.0)], dim=1)
    scores = torch.zeros(3, 6)
    found = linear_datamodeling_score(scores, subsets, outcomes)
    assert found.per_query[0] == 0
    assert found.per_query[1].isnan()
    assert found.value == 0
    with pytest.raises(ValueError, match="nothing to rank"):
        linear_datamodeling_score(scores, subsets, torch.zeros(5, 3))


def test_bad_subsets_are_refused() -> None:
    with pytest.raises(ValueError, match="keeps 10 of 10"):
        draw_subsets(10, 0.99, count=1)
    subsets = draw_subsets(6, 0.5, count=5)
    with pytest.raises(ValueError, match=r"bool \[subset, 7\]"):
        linear_datamodeling_score(torch.zeros(3, 7), subsets, torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"\[5 subsets, 3 queries\]"):
        linear_datamodeling_score(torch.zeros(3, 6), subsets, torch.zeros(5, 4))
    with pytest.raises(ValueError, match="at least 3 subsets"):
        linear_datamodeling_score(torch.zeros(3, 6), subsets[:2], torch.zeros(2, 3))


# Other judgements


def test_auc_counts_pairs() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])
    wrong = torch.tensor([True, False, True, False, False])
    # 6 pairs: 3 above 1, 2, 0; 2 above 1 and 0, level with 2.
    assert detection_auc(values, wrong) == pytest.approx(5.5 / 6)
    assert detection_auc(Scores(torch.ones(1, 5), self_influence=values), wrong) < 1
    with pytest.raises(ValueError, match="no self-influence"):
        detection_auc(Scores(torch.ones(1, 5)), wrong)
    with pytest.raises(ValueError, match="some of both kinds"):
        detection_auc(values, torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be bool"):
        detection_auc(values, wrong.float())


def test_agreement_is_of_ranks() -> None:
    values = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    assert agreement(values, values.exp()).value == pytest.approx(1)
    assert agreement(values, -values).value == pytest.approx(-1)
    with pytest.raises(ValueError, match="same queries"):
        agreement(values, values[:2])


def test_source_on_the_recorded_order_predicts_leaving_one_out() -> None:
    """Weight 0 in the recorded run, every example in turn: unit, sign and rank."""
    run, module, task, data = small("sgd", checkpoints=range(1, 9))
    queries = TensorDataset(*queries_of(CLASSIFIER))
    estimator = Source(curvature="exact", order="recorded")
    scores = AttributionModule(module, run, estimator, task).attribute(
        data, queries, trainer=recorded.trainer()
    )
    work = (run, module, task, data)
    baseline = measure(module, task, retrain(*work, torch.ones(10)), queries)
    states = retrain_each(*work, 1 - torch.eye(10), together=10)
    outcomes = torch.stack([measure(module, task, state, queries) for state in states])
    found = leave_one_out(scores, torch.arange(10), outcomes, baseline)
    assert found.slope == pytest.approx(1, abs=0.1)
    assert found.correlation > 0.99
    assert found.rank.value > 0.95
    with pytest.raises(ValueError, match=r"outcomes \[3, 3\]"):
        leave_one_out(scores, torch.arange(3), outcomes, baseline)


def test_removal_differs_from_weight_zero_by_the_mean() -> None:
    """Ridge regression to its optimum: removal re-normalises, weight 0 keeps 1/N."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 3, generator=generator).double()
    targets = inputs @ torch.tensor([1.0, -1, 2]).double() + 0.3
    query = torch.randn(3, generator=generator).double()

    def measured(weights: torch.Tensor, total: float) -> float:
        gram = (inputs * weights[:, None]).T @ inputs / total + 0.5 * torch.eye(3)
        weight = torch.linalg.solve(gram, (inputs * weights[:, None]).T @ targets / total)
        return float((query @ weight - 1) ** 2)

    ones = torch.ones(200).double()
    left_out = ones - torch.eye(200).double()
    weight_zero = torch.tensor([[measured(row, 200) - measured(ones, 200) for row in left_out]])
    removed = torch.tensor([[measured(row, 199) - measured(ones, 200) for row in left_out]])
    gap = (weight_zero - removed).abs().mean()
    assert (as_removal(weight_zero) - removed).abs().mean() < 0.1 * gap


def test_regression_measures_each_query() -> None:
    network = nn.Linear(2, 1)
    state = {"weight": torch.tensor([[1.0, 0.0]]), "bias": torch.zeros(1)}
    queries = TensorDataset(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.zeros(2, 1))
    found = measure(network, RegressionTask(), state, queries, batch_size=1)
    assert found.tolist() == [9.0, 1.0]
