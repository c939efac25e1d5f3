"""Judgements beyond subsets, against closed forms and scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Scores
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.evaluation import (
    agreement,
    as_removal,
    detection_auc,
    draw_subsets,
    found_within,
    group_removal,
    leave_one_out,
    linear_datamodeling_score,
    measure,
    predicted_changes,
    proximal_bregman_response,
    retrain_each,
    top_removal,
)
from tda_lightning.evaluation.baselines import (
    last_checkpoint,
    last_layer_cosine,
    random_scores,
    self_loss,
)
from tda_lightning.evaluation.linear_datamodeling import NothingToRankError
from tda_lightning.tasks import ClassificationTask, LanguageModelingTask, RegressionTask
from tests import runs as recorded
from tests.cases.training import CLASSIFIER, queries_of
from tests.evaluation.test_evaluation import small


def ridge(weights: torch.Tensor, total: torch.Tensor | float, inputs, targets, query):
    """A query's prediction by the minimum of a weighted ridge regression."""
    gram = (inputs * weights[:, None]).T @ inputs / total + 0.5 * torch.eye(inputs.shape[1])
    solved = torch.linalg.solve(gram, (inputs * weights[:, None]).T @ targets / total)
    return query @ solved


@pytest.fixture
def linear():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 3, generator=generator).double()
    targets = inputs @ torch.tensor([1.0, -1, 2]).double()
    targets += torch.randn(300, generator=generator)
    queries = torch.randn(4, 3, generator=generator).double()
    ones = torch.ones(300).double()
    return inputs, targets, queries, ones


def exact_scores(inputs, targets, queries, ones):
    """Derivative of each query's prediction along each example's weight, negated."""
    weights = ones.clone().requires_grad_()
    predictions = ridge(weights, 300, inputs, targets, queries)
    rows = [torch.autograd.grad(p, weights, retain_graph=True)[0] for p in predictions]
    return -torch.stack(rows)


def test_exact_scores_of_a_linear_model_rank_retraining_perfectly(linear) -> None:
    """Outcomes that are linear in the weights: the closed form is 1."""
    scores = exact_scores(*linear)
    subsets = draw_subsets(300, 0.9, 40)
    outcomes = predicted_changes(scores, subsets).T
    found = linear_datamodeling_score(scores, subsets, outcomes)
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
    # And the real thing, whose minimum is nearly linear in the weights.
    inputs, targets, queries, _ = linear
    retrained = torch.stack([ridge(s.double(), 300, inputs, targets, queries) for s in subsets])
    assert linear_datamodeling_score(scores, subsets, retrained).value > 0.98


def test_groups_at_weight_zero_and_removed_have_their_own_forms(linear) -> None:
    inputs, targets, queries, ones = linear
    scores = exact_scores(*linear)
    kept = draw_subsets(300, 0.95, 30)
    baseline = ridge(ones, 300, inputs, targets, queries)
    rows = [row.double() for row in kept]
    at_zero = torch.stack([ridge(row, 300, inputs, targets, queries) for row in rows])
    removed = torch.stack([ridge(row, row.sum(), inputs, targets, queries) for row in rows])
    found = group_removal(scores, kept, at_zero, baseline)
    assert found.slope == pytest.approx(1, abs=0.1)
    assert found.correlation > 0.99
    found = group_removal(scores, kept, removed, baseline, removed=True)
    assert found.slope == pytest.approx(1, abs=0.1)
    assert found.correlation > 0.99
    wrong = predicted_changes(scores, kept) - (removed - baseline).T
    right = predicted_changes(scores, kept, removed=True) - (removed - baseline).T
    assert right.norm() < 0.2 * wrong.norm()
    one = ~torch.eye(300).bool()
    torch.testing.assert_close(predicted_changes(scores, one, removed=True), as_removal(scores))
    with pytest.raises(ValueError, match=r"kept must be bool \[retraining, 300\]"):
        predicted_changes(scores, kept.float())
    with pytest.raises(ValueError, match="at least one example"):
        predicted_changes(scores, torch.zeros(1, 300, dtype=torch.bool), removed=True)


def test_auc_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.randint(0, 8, (60,), generator=generator).float()  # with ties
        wrong = torch.rand(60, generator=generator) < 0.2
        assert detection_auc(values, wrong) == pytest.approx(roc_auc_score(wrong, values))


def test_a_planted_set_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(100, generator=generator)
    wrong = torch.zeros(100, dtype=torch.bool)
    wrong[torch.randperm(100, generator=generator)[:10]] = True
    planted = values + wrong
    assert detection_auc(planted, wrong) == 1
    assert found_within(planted, wrong, 0.1) == 1
    assert found_within(planted, wrong, 0.05) == 0.5
    assert found_within(-planted, wrong, 0.9) == 0
    assert found_within(torch.zeros(100), wrong, 0.3) == pytest.approx(0.3)  # ties in proportion
    with pytest.raises(ValueError, match="fraction must be above 0"):
        found_within(planted, wrong, 0)


def test_wrong_labels_stand_out_by_their_own_loss() -> None:
    """A trained linear classifier of two clusters, a tenth of whose labels are turned round."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    inputs = torch.randn(100, 2, generator=generator) + 6 * labels[:, None] - 3
    wrong = torch.arange(100) % 10 == 3
    given = torch.where(wrong, 1 - labels, labels)
    state = {"weight": torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), "bias": torch.zeros(2)}
    data = TensorDataset(inputs, given)
    found = self_loss(nn.Linear(2, 2), ClassificationTask(), state, data, num_queries=3)
    assert found.values.shape == (3, 100)
    assert detection_auc(found, wrong) == 1


def test_baselines() -> None:
    run, module, task, data = small("sgd", checkpoints=range(1, 9))
    queries = TensorDataset(*queries_of(CLASSIFIER))
    state = run.checkpoints[run.last_step].parameters
    found = last_layer_cosine(module, task, state, data, queries)
    module.load_state_dict(state)
    features = [module[1](module[0](part.tensors[0])) for part in (queries, data)]
    expected = nn.functional.cosine_similarity(features[0][:, None], features[1][None], dim=2)
    torch.testing.assert_close(found.values, expected.detach().float())
    with pytest.raises(ValueError, match="no linear layer"):
        last_layer_cosine(nn.Conv1d(1, 1, 1), RegressionTask(), {}, *convolved())
    assert torch.equal(random_scores(2, 5, 1).values, random_scores(2, 5, 1).values)
    assert list(last_checkpoint(run).checkpoints) == [0, run.last_step]


def convolved():
    data = TensorDataset(torch.ones(2, 1, 3), torch.ones(2, 1, 3))
    return data, data


def test_proponents_are_missed_more_than_random_examples() -> None:
    run, module, task, data = small("sgd", checkpoints=range(1, 9))
    queries = TensorDataset(*queries_of(CLASSIFIER))
    work = (run, module, task, data)
    alone = [measure(module, task, s, queries) for s in retrain_each(*work, 1 - torch.eye(10))]
    (whole,) = (measure(module, task, s, queries) for s in retrain_each(*work, torch.ones(1, 10)))
    truth = Scores((torch.stack(alone) - whole).T)
    one, three = top_removal(*work, queries, truth, ks=[1, 3], draws=4)
    assert (one.k, three.k) == (1, 3)
    torch.testing.assert_close(one.rise.per_query, truth.values.max(1).values.double())
    assert three.rise.value > one.rise.value > one.random_rise.value
    assert three.rise.value > three.random_rise.value
    for found in (one, three):
        difference = found.rise.per_query - found.random_rise.per_query
        torch.testing.assert_close(found.above_random.per_query, difference)
        assert found.above_random.low <= found.above_random.value <= found.above_random.high
    assert 0 <= one.flipped <= 1 and 0 <= one.random_flipped <= 1
    with pytest.raises(ValueError, match="from 1 to 9"):
        top_removal(*work, queries, truth, ks=[10])
    with pytest.raises(ValueError, match="of 3 queries, got 2"):
        top_removal(*work, TensorDataset(*queries[:2]), truth, ks=[1])


# The proximal Bregman response


def test_the_response_of_a_linear_model_has_a_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 3, generator=generator).double()
    targets = torch.randn(20, 1, generator=generator).double()
    module = nn.Linear(3, 1, bias=False).double()
    state = {"weight": torch.randn(1, 3, generator=generator).double()}
    queries = TensorDataset(inputs[:4], targets[:4])
    found = proximal_bregman_response(
        module, RegressionTask(), state, TensorDataset(inputs, targets), queries, [2, 5], 0.3
    )
    start = state["weight"].T
    for column, example in enumerate((2, 5)):
        x = inputs[example : example + 1]
        # Quadratic throughout: the matrix of the others' divergences, less that of the example.
        matrix = 2 * (inputs.T @ inputs - x.T @ x) / 20 + 0.3 * torch.eye(3)
        slope = 2 * x.T @ (x @ start - targets[example : example + 1]) / 20
        moved = start + torch.linalg.solve(matrix, slope)
        change = (inputs[:4] @ moved - targets[:4]) ** 2 - (inputs[:4] @ start - targets[:4]) ** 2
        torch.testing.assert_close(found[:, column], change[:, 0], rtol=1e-6, atol=1e-9)


def test_influence_functions_predict_the_response() -> None:
    """Their own question: not only its ranks but its size."""
    run, module, task, data = small("sgd", checkpoints=range(1, 9))
    queries = TensorDataset(*queries_of(CLASSIFIER))
    estimator = InfluenceFunction(curvature="exact", damping=1.0)
    scores = AttributionModule(module, run, estimator, task).attribute(
        data, queries, trainer=recorded.trainer()
    )
    state = run.checkpoints[run.last_step].parameters
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = proximal_bregman_response(module, task, state, data, queries, range(10), damping=1.0)
    pairs = torch.stack([scores.values.double().flatten(), found.flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.99
    slope = float(pairs[0] @ pairs[1] / pairs[0].square().sum())
    assert slope == pytest.approx(1, abs=0.1)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_impossible_responses_are_refused() -> None:
    run, module, task, data = small()
    state = run.checkpoints[run.last_step].parameters
    with pytest.raises(ValueError, match="damping must be positive"):
        proximal_bregman_response(module, task, state, data, data, [0], 0.0)
    with pytest.raises(TypeError, match="got LanguageModelingTask"):
        proximal_bregman_response(module, LanguageModelingTask(), state, data, data, [0], 1.0)


def test_what_ranks_nothing_is_said_and_not_counted_as_nothing() -> None:
    torch.manual_seed(0)
    scores, constant = torch.randn(2, 8), torch.zeros(2, 8)
    for pair in ((scores, constant), (constant, scores)):
        with pytest.raises(NothingToRankError, match="constant in one of the two"):
            agreement(*pair)
    half = torch.stack([scores[0], constant[0]])
    for pair in ((scores, half), (half, scores)):
        assert agreement(*pair).per_query.isnan().tolist() == [False, True]
    with pytest.raises(NothingToRankError, match="at least 3 retrainings, got 2"):
        leave_one_out(scores, torch.tensor([0, 1]), torch.randn(2, 2), torch.zeros(2))
    outcomes = torch.randn(5, 2)
    outcomes[3, 1] = torch.nan
    with pytest.raises(ValueError, match="outcomes are not finite"):
        linear_datamodeling_score(scores, draw_subsets(8, 0.5, 5), outcomes)
    wrong = torch.tensor([True, False, False])
    with pytest.raises(ValueError, match="not finite"):
        detection_auc(torch.tensor([1.0, torch.nan, 2.0]), wrong)
