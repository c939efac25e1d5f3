"""What experiments/distributional ranks by, against the definitions."""

import torch
from scipy.stats import wasserstein_distance

from experiments.distributional.measures import MEASURES

OWN = torch.Generator().manual_seed(0)
SCORES = torch.randn(5, 3, 4, generator=OWN, dtype=torch.float64)
LOSSES = torch.randn(5, 3, generator=OWN, dtype=torch.float64)


def test_measures_of_an_ensemble_are_those_of_the_distribution_with_and_without_an_example():
    found = {name: measure(SCORES, LOSSES) for name, measure in MEASURES.items()}
    for query in range(3):
        for example in range(4):
            before = LOSSES[:, query]
            after = before + SCORES[:, query, example]
            assert torch.isclose(found["mean"][query, example], after.mean() - before.mean())
            change = after.var() - before.var()
            assert torch.isclose(found["variance"][query, example], change)
            # The distance of order 1 bounds that of order 2 from below.
            distance = found["Wasserstein"][query, example]
            assert abs(distance) >= wasserstein_distance(after, before) - 1e-12
            assert distance.sign() == SCORES[:, query, example].mean().sign()
    # All runs moved alike: the distance is the move.
    moved = MEASURES["Wasserstein"](torch.full((5, 3, 1), -0.5).double(), LOSSES)
    assert torch.allclose(moved, torch.tensor(-0.5).double())
