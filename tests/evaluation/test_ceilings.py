"""What can be reached, against simulations whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tda_lightning.evaluation import (
    NothingToRankError,
    additive_ceiling,
    draw_subsets,
    fitted_linear_model,
    linear_datamodeling_score,
    seed_ceiling,
)
from tda_lightning.evaluation.additive import _reach, _ridge
from tda_lightning.evaluation.ceilings import pearson_from_rank, rank_from_pearson


def measured(signal: np.ndarray, share: np.ndarray, seeds: int, generator) -> torch.Tensor:
    """[subset, seed, query], with this share of the variance of one seed in the signal."""
    subsets, queries = signal.shape
    noise = generator.standard_normal((subsets, seeds, queries))
    return torch.from_numpy(np.sqrt(share) * signal[:, None] + np.sqrt(1 - share) * noise)


def rank(predicted: np.ndarray, truth: torch.Tensor) -> float:
    """Mean over queries of Spearman's correlation, by SciPy, one query at a time."""
    columns = range(predicted.shape[1])
    return float(np.mean([spearmanr(predicted[:, q], truth[:, q])[0] for q in columns]))


@pytest.mark.parametrize(
    ("subsets", "seeds", "alike"), [(30, 2, True), (30, 2, False), (20, 5, False)]
)
def test_the_limit_is_what_the_mean_over_all_seeds_reaches(subsets, seeds, alike) -> None:
    """Known signal and noise; in most simulations the interval covers the truth."""
    generator = np.random.default_rng(0)
    covered, found, expected = 0, [], []
    for _ in range(8):
        share = np.full(12, 0.5) if alike else generator.uniform(0, 1, 12)
        reliability = seeds * share / (1 + (seeds - 1) * share)
        truth = float(rank_from_pearson(np.sqrt(reliability), subsets).mean())
        signal = generator.standard_normal((subsets, 12))
        outcomes = measured(signal, share, seeds, generator)
        limit = seed_ceiling(outcomes, resamples=40).over_subsets
        covered += limit.low <= truth <= limit.high
        found.append(limit.value)
        # The definition itself: the mean over seeds is all that there is to know.
        expected.append(rank(signal, outcomes.mean(1)))
    assert covered >= 7
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.03)


def test_the_limit_has_the_intervals_of_its_queries_and_subsets() -> None:
    generator = np.random.default_rng(1)
    signal = generator.standard_normal((40, 10))
    outcomes = measured(signal, np.linspace(0.1, 0.9, 10), 2, generator)
    limit = seed_ceiling(outcomes, resamples=60)
    for interval in (limit.over_queries, limit.over_subsets):
        assert 0 < interval.low < interval.value < interval.high < 1
        assert interval.value == limit.over_queries.value
    assert limit.over_queries.per_query[-3:].mean() > limit.over_queries.per_query[:3].mean()
    assert float(limit.over_queries.per_query.mean()) == pytest.approx(limit.over_queries.value)
    # A query that measures the same after all trainings is left out, as in the score.
    constant = torch.cat([outcomes, torch.ones(40, 2, 1)], 2)
    again = seed_ceiling(constant, resamples=60)
    assert again.over_queries.value == limit.over_queries.value
    assert again.over_queries.per_query.isnan().tolist() == [False] * 10 + [True]
    # Units are nothing to ranks.
    scaled = seed_ceiling(outcomes * 3 + 5, resamples=60)
    assert scaled.over_queries.value == pytest.approx(limit.over_queries.value)


def test_noise_alone_and_no_noise_at_all() -> None:
    generator = np.random.default_rng(2)
    signal = generator.standard_normal((40, 15))
    nothing = seed_ceiling(measured(signal, np.zeros(15), 2, generator), resamples=60).over_subsets
    assert nothing.value < 0.35 and nothing.low == 0
    assert linear_score_of(signal, np.zeros(15), generator) < nothing.high
    everything = seed_ceiling(measured(signal, np.ones(15), 2, generator), resamples=5).over_subsets
    assert everything.value == pytest.approx(1, abs=1e-6)


def linear_score_of(signal, share, generator) -> float:
    return rank(signal, measured(signal, share, 2, generator).mean(1))


def test_one_seed_tells_nothing_of_seeds() -> None:
    with pytest.raises(ValueError, match="at least 2 seeds of at least 4 subsets, got 1 and 10"):
        seed_ceiling(torch.randn(10, 1, 3))
    with pytest.raises(NothingToRankError, match="constant"):
        seed_ceiling(torch.ones(10, 2, 3))


def test_morans_formula_is_the_mean_over_samples() -> None:
    generator = np.random.default_rng(3)
    pairs = generator.standard_normal((2, 4000, 8))
    second = 0.6 * pairs[0] + 0.8 * pairs[1]
    ranks = [np.argsort(np.argsort(part, axis=1), axis=1) - 3.5 for part in (pairs[0], second)]
    mean = float(((ranks[0] * ranks[1]).sum(1) / (ranks[0] ** 2).sum(1)).mean())
    assert float(rank_from_pearson(np.array(0.6), 8)) == pytest.approx(mean, abs=0.01)
    grid = np.linspace(-0.99, 0.99, 50)
    np.testing.assert_allclose(pearson_from_rank(rank_from_pearson(grid, 8), 8), grid, atol=1e-5)


def additive_and_not(subsets: torch.Tensor, queries: int, share: float, generator) -> tuple:
    """Coefficients, and measurements of which they explain this share; the rest are products."""
    train = subsets.shape[1]
    weights = (subsets.double().numpy() - 0.5) / np.sqrt(train / 4)
    coefficients = generator.standard_normal((train, queries))
    factors = (weights @ generator.standard_normal((train, 5))) ** 2 - 1
    products = factors @ generator.standard_normal((5, queries)) / np.sqrt(10)
    values = np.sqrt(share) * weights @ coefficients + np.sqrt(1 - share) * products
    return torch.from_numpy(coefficients), torch.from_numpy(values)[:, None]


def test_a_monotone_function_of_something_additive_can_be_reached() -> None:
    """Ranks do not see it, and neither do the limits."""
    generator = np.random.default_rng(6)
    subsets = draw_subsets(30, 0.5, 80)
    coefficients, outcomes = additive_and_not(subsets, 5, 1.0, generator)
    assert linear_datamodeling_score(-coefficients.T, subsets, outcomes.exp()).value > 0.999
    limits = [additive_ceiling(subsets, y).over_subsets for y in (outcomes, (3 * outcomes).exp())]
    assert limits[0].value == limits[1].value and limits[0].high == 1
    assert limits[0].value > 0.93
    fits = [fitted_linear_model(subsets, y).over_queries for y in (outcomes, (3 * outcomes).exp())]
    assert fits[0].value == pytest.approx(fits[1].value)


@pytest.mark.parametrize(("count", "train"), [(60, 80), (100, 300)])
def test_what_additive_scores_reach_is_estimated_without_fitting_them(count, train) -> None:
    generator = np.random.default_rng(4)
    covered, found, reached = 0, [], []
    for seed in range(12):
        subsets = draw_subsets(train, 0.5, count, seed)
        coefficients, outcomes = additive_and_not(subsets, 15, 0.6, generator)
        best = linear_datamodeling_score(-coefficients.T, subsets, outcomes, resamples=1).value
        limit = additive_ceiling(subsets, outcomes, resamples=60).over_subsets
        expected = float(rank_from_pearson(np.sqrt(np.array(0.6)), count))
        covered += limit.low <= expected <= limit.high
        found.append(limit.value)
        reached.append(best)
    assert covered >= 10
    assert np.mean(found) == pytest.approx(np.mean(reached), abs=0.05)


def test_a_fitted_linear_model_is_a_lower_limit() -> None:
    generator = np.random.default_rng(5)
    subsets = draw_subsets(30, 0.5, 90)
    coefficients, outcomes = additive_and_not(subsets, 6, 0.8, generator)
    best = linear_datamodeling_score(-coefficients.T, subsets, outcomes).value
    fitted = fitted_linear_model(subsets, outcomes)
    assert 0.6 < fitted.over_queries.value < best
    assert fitted.over_subsets.low < fitted.over_queries.value < fitted.over_subsets.high
    # It predicts what it has not seen: noise that has nothing to do with subsets is not predicted.
    noise = fitted_linear_model(subsets, torch.randn(90, 1, 6))
    assert abs(noise.over_queries.value) < 0.15


def test_the_ridge_is_the_best_at_leaving_one_out() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(8, 5, generator=generator).double()
    measured = weights @ torch.randn(5, 1, generator=generator).double()
    measured = measured + torch.randn(8, 1, generator=generator)
    kernel = weights @ weights.T
    centred = measured - measured.mean(0)

    def coefficients(ridge: float, rows: torch.Tensor) -> torch.Tensor:
        gram = weights[rows].T @ weights[rows] + ridge * torch.eye(5)
        return torch.linalg.solve(gram, weights[rows].T @ centred[rows])

    def error(ridge: float) -> float:
        missed = [
            (centred[i] - weights[i] @ coefficients(ridge, torch.arange(8) != i)) ** 2
            for i in range(8)
        ]
        return float(torch.stack(missed).sum())

    grid = [float(torch.trace(kernel)) / 8 * 10 ** (power / 2) for power in range(-6, 7)]
    best = min(grid, key=error)
    assert grid[0] < best < grid[-1]
    expected = coefficients(best, torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(weights.T @ _ridge(kernel, measured), expected)


def test_where_nothing_can_be_fitted_there_is_no_number() -> None:
    outcomes = torch.randn(30, 1, 4)
    assert fitted_linear_model(draw_subsets(400, 0.5, 30), outcomes) is None
    assert fitted_linear_model(draw_subsets(20, 0.5, 9), outcomes[:9]) is None
    single = ~torch.eye(30, dtype=torch.bool)
    assert fitted_linear_model(single, outcomes) is None
    assert additive_ceiling(single, outcomes) is None
    with pytest.raises(NothingToRankError, match="constant"):
        additive_ceiling(draw_subsets(20, 0.5, 30), torch.ones(30, 1, 4))


def test_the_reach_of_a_design_is_what_a_projection_predicts() -> None:
    generator = torch.Generator().manual_seed(0)
    subsets = draw_subsets(100, 0.5, 50).double() - 0.5
    folds = torch.arange(50) % 10
    truth = subsets @ torch.randn(100, 400, generator=generator).double()
    predicted = torch.empty_like(truth)
    for fold in range(10):
        held = folds == fold
        solution = torch.linalg.lstsq(subsets[~held], truth[~held], driver="gelsd").solution
        predicted[held] = subsets[held] @ solution
    correlation = torch.corrcoef(torch.stack([predicted.flatten(), truth.flatten()]))[0, 1]
    assert _reach(subsets @ subsets.T, folds) == pytest.approx(float(correlation), abs=0.02)
