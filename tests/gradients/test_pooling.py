"""Maxima over windows in the layout that torch is fast in: the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.gradients import GradientEngine, pooling
from tda_lightning.gradients.pooling import max_pool2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        ((3, 2), {"stride": (1, 2), "padding": 1}),
        (2, {"stride": 1, "dilation": 2}),
        (3, {"stride": 2, "ceil_mode": True}),
    ],
)
def test_values_and_gradients_are_those_of_torch(size, options, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 16, 9, 10, generator=generator, dtype=dtype).relu()  # many zeros alike
    images[0, 0, 0, 0] = torch.nan
    leaves = [images.clone().requires_grad_() for _ in range(2)]
    pooled = [torch.max_pool2d(leaves[0], size, **options), max_pool2d(leaves[1], size, **options)]
    assert "MaxPool" in pooled[1].grad_fn.name() and pooled[1].is_contiguous()
    torch.testing.assert_close(pooled[1], pooled[0], rtol=0, atol=0, equal_nan=True)
    weights = torch.randn(pooled[0].shape, generator=generator, dtype=dtype)
    first, second = (
        torch.autograd.grad(own, leaf, weights)[0] for own, leaf in zip(pooled, leaves, strict=True)
    )
    assert torch.equal(first, second)


def test_second_derivatives() -> None:
    images = torch.randn(2, 16, 4, 4, dtype=torch.float64, requires_grad=True)
    pooled = max_pool2d(images, 2)
    (slopes,) = torch.autograd.grad(pooled.square().sum(), images, create_graph=True)
    (curved,) = torch.autograd.grad(slopes.sum(), images)
    largest = (F.interpolate(pooled, scale_factor=2) == images).double()
    torch.testing.assert_close(curved, 2 * largest)


@pytest.mark.parametrize(
    "images",
    [
        torch.randn(2, 3, 4, 4),
        torch.randn(16, 4, 4),
        torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(2, 16, 4, 4, dtype=torch.bfloat16),
    ],
)
def test_others_are_left_to_torch(images: Tensor) -> None:
    pooled = max_pool2d(images.requires_grad_(), 2)
    assert "Max" in pooled.grad_fn.name() and "_MaxPool" not in pooled.grad_fn.name()
    assert torch.equal(pooled, torch.max_pool2d(images, 2))


def test_the_engine_pools_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    images, labels = torch.randn(6, 3, 6, 6).double(), torch.arange(6) % 3

    def loss(module: nn.Module, batch: Tensor, examples: Tensor) -> Tensor:
        return F.cross_entropy(module(batch), labels[examples], reduction="none")

    counted = []
    monkeypatch.setattr(
        pooling._MaxPool,
        "apply",
        lambda *a, own=pooling._MaxPool.apply: counted.append(1) or own(*a),
    )
    engine = GradientEngine(module, [name for name, _ in module.named_parameters()])
    engine.discover(loss, images, torch.arange(6))
    found = engine.gradients(loss, images, torch.arange(6))
    assert counted
    parameters = dict(module.named_parameters())
    for example in range(6):
        own = loss(module, images[example : example + 1], torch.tensor([example]))
        expected = dict(zip(parameters, torch.autograd.grad(own, parameters.values()), strict=True))
        for block in engine.blocks:
            gradient = found.blocks[block.name].dense(slice(example, example + 1))[0]
            torch.testing.assert_close(gradient, block.matrix(expected), rtol=1e-9, atol=1e-12)
