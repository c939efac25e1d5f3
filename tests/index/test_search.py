"""A search finds the best rows, in order, whatever the blocks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tda_lightning.index.best import Best
from tda_lightning.index.factors import FactoredBlock, FactorPairs
from tda_lightning.index.search import search
from tda_lightning.store.index_files import Shard


def test_of_equal_rows_the_first_is_named():
    """Every score is there five times."""
    values = torch.arange(40.0).repeat_interleave(5)[None] % 17
    for block in (1, 3, 64, 200):
        best = Best(1, 7, torch.float32)
        for first in range(0, 200, block):
            rows = torch.arange(first, min(first + block, 200))
            best.add(values[:, rows], rows)
        order = np.lexsort((np.arange(200), -values[0].numpy()))[:7]
        assert best.helping[1][0].tolist() == order.tolist()
        order = np.lexsort((np.arange(200), values[0].numpy()))[:7]
        assert best.hurting[1][0].tolist() == order.tolist()


def pairs_of(height, width, rank=1, groups=1):
    """Factor pairs of one layer, whose stored numbers are u and v themselves."""
    left = torch.eye(height).expand(groups, -1, -1)
    right = torch.eye(width).expand(groups, -1, -1)
    scales = torch.ones(groups, height), torch.ones(groups, width)
    return FactorPairs({"a": FactoredBlock((left,), (left,), right, right, rank, *scales)})


def asked_of(compression, queries, decay):
    """Matrices whose singular values fall by this factor."""
    (own,) = compression.blocks.values()
    (groups, height), width = own.row_scale.shape, own.column_scale.shape[1]
    least = min(height, width)
    spectrum = decay ** torch.arange(least, dtype=torch.float32)
    left, right = (torch.randn(queries, groups, size, least) for size in (height, width))
    return compression.asked((left * spectrum @ right.mT).flatten(1))


@pytest.mark.parametrize(
    ("shape", "rank", "groups", "size"),
    [
        ((130, 140), 1, 1, 1.0),
        ((150, 130), 3, 1, 1.0),
        ((140, 150), 2, 2, 1.0),
        ((130, 140), 1, 1, 1e-13),  # of a query that the model is sure of
        ((130, 140), 1, 1, 1e13),
    ],
)
def test_rough_products_are_off_by_their_bound_at_most(shape, rank, groups, size):
    compression = pairs_of(*shape, rank, groups)
    asked = size * asked_of(compression, 4, 0.85)
    stored = torch.randint(-127, 128, (300, compression.width)).float()
    rough = compression.rough(asked)
    off = (rough.products(stored) - compression.dot(asked, stored)).abs()
    bound = rough.bound(stored)
    assert (off <= bound).all()
    assert (bound <= rough.largest(127)[:, None] * 1.0001).all()
    assert (bound.amax(1) < compression.dot(asked, stored).abs().amax(1)).all()  # it rules some out


@pytest.mark.parametrize(("decay", "pruned"), [(0.7, True), (1.0, False)])
def test_pruning_finds_what_a_search_of_all_rows_finds(monkeypatch, decay, pruned):
    """Whose queries' singular values do not fall, is not pruned."""
    compression, rows, k = pairs_of(130, 140), 6000, 5
    asked = asked_of(compression, 3, decay)
    codes = torch.randint(-127, 128, (rows, compression.width), dtype=torch.int8)
    codes[3000:3003] = codes[:3]  # of equal rows the first
    scales = torch.rand(rows)
    shards = [
        Shard(Path(), first, codes[first : first + 1500].numpy(), own.numpy(), 0)
        for first, own in zip(range(0, rows, 1500), scales.split(1500), strict=True)
    ]
    multiplied = []
    dot = FactorPairs.dot
    monkeypatch.setattr(
        FactorPairs, "dot", lambda *given: multiplied.append(len(given[2])) or dot(*given)
    )
    best = search(compression, asked, shards, "int8", k, 0.5)
    expected = dot(compression, asked.double(), codes.double()) * (0.5 * scales.double() ** 2)
    for sign, (values, indices) in ((1, best.helping), (-1, best.hurting)):
        order = (sign * expected).sort(dim=1, descending=True, stable=True)
        assert torch.equal(indices, order.indices[:, :k])
        torch.testing.assert_close(values.double(), order.values[:, :k], rtol=1e-4, atol=1e-4)
    assert (sum(multiplied) < rows / 2) == pruned
