"""Projection, weights from scores and balanced weights, against general solvers of scipy."""

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, brentq, minimize

from tda_lightning.reweighting import (
    balanced_weights,
    check_weights,
    imbalance,
    predicted_change,
    project,
    weights_from_scores,
)
from tests.quick import quick


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_scipy(value, slope, count: int, bound: float) -> np.ndarray:
    found = minimize(
        value,
        np.ones(count),
        jac=slope,
        method="SLSQP",
        bounds=[(0, bound)] * count,
        constraints=[{"type": "eq", "fun": lambda w: w.sum() - count, "jac": np.ones_like}],
        options={"ftol": 1e-13, "maxiter": 1000},
    )
    assert found.success
    return found.x


@pytest.mark.parametrize("bound", [1.0, 1.5, 4.0, 50.0])
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_the_projection_is_the_nearest_point(bound: float, size: float) -> None:
    values = 1 + size * draw(30)
    found = project(values, bound)
    assert float(found.min()) >= 0 and float(found.max()) <= bound
    assert abs(float(found.sum()) - 30) < 1e-10
    # The one shift at which they sum to N, by a root finder.
    given = values.numpy()
    shift = brentq(lambda t: np.clip(given - t, 0, bound).sum() - 30, -60, 60, xtol=1e-14)
    if bound > 1:
        asked = torch.from_numpy(np.clip(given - shift, 0, bound))
        torch.testing.assert_close(found, asked, rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-12)
    # What fulfils all conditions stays.
    torch.testing.assert_close(project(found, bound), found, rtol=0, atol=1e-12)


def test_a_step_towards_what_helps() -> None:
    scores = draw(5, 40)
    weights = weights_from_scores(scores, rate=0.3, bound=10.0)
    mean = scores.mean(0)
    expected = 1 + 0.3 * (mean - mean.mean()) / mean.std(unbiased=False)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    assert float(predicted_change(scores, weights).mean()) < 0
    away = weights_from_scores(scores, rate=-0.3, bound=10.0)
    assert float(predicted_change(scores, away).mean()) > 0
    far = weights_from_scores(scores, rate=5.0, bound=2.0)
    assert (float(far.min()), float(far.max())) == (0.0, 2.0)
    assert abs(float(far.sum()) - 40) < 1e-10
    # Without an example: its score.
    ones = torch.ones(40, dtype=torch.float64)
    ones[7] = 0
    torch.testing.assert_close(predicted_change(scores, ones), scores[:, 7], rtol=1e-12, atol=0)


def words(size: int = 60, features: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    own = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (size,), generator=own)
    tilt = 0.25 + 0.2 * draw(features, 3, seed=1).tanh()
    chance = torch.rand(size, features, generator=own, dtype=torch.float64)
    return (chance < tilt[:, labels].T).double(), labels


@pytest.mark.parametrize("bound", quick([1.3, 6.0], [1.3]))  # which many weights are at
def test_balanced_weights_are_the_optimum(bound: float) -> None:
    x, y = words()
    found = balanced_weights(x, y, bound=bound, penalty=0.05, tolerance=1e-12)
    one_hot = torch.nn.functional.one_hot(y).double()
    centred = (one_hot - one_hot.mean(0)).numpy()
    with_all = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1).numpy()
    # Every pair of a feature and a class is a row.
    rows = np.concatenate([with_all.T * column for column in centred.T])
    scale = np.tile(1 / with_all.sum(0), 3)

    def value(w):
        return (scale * (rows @ w) ** 2).sum() / 2 + 0.05 / 2 * ((w - 1) ** 2).sum()

    def slope(w):
        return rows.T @ (scale * (rows @ w)) + 0.05 * (w - 1)

    asked = by_scipy(value, slope, len(x), bound)
    own = found.weights.numpy()
    assert value(own) <= value(asked) + 1e-12
    np.testing.assert_allclose(own, asked, atol=2e-5)
    # By a solver of another kind, with the sum as a linear constraint.
    other = minimize(
        value,
        np.ones(len(x)),
        jac=slope,
        method="trust-constr",
        bounds=[(0, bound)] * len(x),
        hess=lambda _: (rows.T * scale) @ rows + 0.05 * np.eye(len(x)),
        constraints=[LinearConstraint(np.ones(len(x)), len(x), len(x))],
        options={"gtol": 1e-10, "xtol": 1e-12, "maxiter": 500},
    )
    assert value(own) <= other.fun + 1e-9
    assert abs(own.sum() - len(x)) < 1e-9 and own.min() >= 0 and own.max() <= bound


def test_features_no_longer_tell_the_label() -> None:
    x, y = words(400)
    found = balanced_weights(x, y, bound=20.0, penalty=1e-3)
    assert float(found.before.abs().max()) > 0.1
    assert float(found.after.abs().max()) < float(found.before.abs().max()) / 30
    assert found.gap <= 1e-9
    # By counting.
    weight, has, label = found.weights, x[:, 2].bool(), y == 1
    by_hand = weight[has & label].sum() / weight[has].sum() - weight[label].sum() / weight.sum()
    torch.testing.assert_close(found.after[2, 1], by_hand, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.before, imbalance(x, y, torch.ones(400)))


def test_impossible_settings() -> None:
    x, y = words()
    ones = torch.ones(60, dtype=torch.float64)
    negative, nothing = ones.clone(), 0 * ones
    negative[4] = -0.5
    broken = ones.clone()
    broken[3] = torch.nan
    for weights, message in (
        (negative, r"1 weights are negative \(the first: -0.5 for training example 4\)"),
        (nothing, "All 60 weights are 0: nothing would be trained on"),
        (broken, "The weight of training example 3 is nan"),
        (ones[:9], "one number for each of 60"),
    ):
        with pytest.raises(ValueError, match=message):
            check_weights(weights, 60)
    with pytest.raises(ValueError, match="bound must be at least 1"):
        project(ones, 0.5)
    with pytest.raises(ValueError, match="1 that are not finite"):
        project(broken, 2.0)
    with pytest.raises(ValueError, match="example 3 has no finite score"):
        weights_from_scores(broken[None])
    with pytest.raises(ValueError, match="the same score"):
        weights_from_scores(ones[None])
    with pytest.raises(ValueError, match="rate must be a number"):
        weights_from_scores(draw(2, 3), rate=float("nan"))
    with pytest.raises(ValueError, match="the shape"):
        weights_from_scores(ones)
    with pytest.raises(ValueError, match="one label"):
        balanced_weights(x, 0 * y)
    with pytest.raises(ValueError, match="penalty must be a number above 0"):
        balanced_weights(x, y, penalty=0.0)
    with pytest.raises(ValueError, match="has feature 8"):
        balanced_weights(torch.cat([x, nothing[:, None]], dim=1), y)
    with pytest.raises(ValueError, match="at least 0"):
        balanced_weights(x - 1, y)
    with pytest.raises(ValueError, match="one label for each"):
        balanced_weights(x, y[:5])
    with pytest.raises(ValueError, match="class numbers"):
        balanced_weights(x, y.double())
