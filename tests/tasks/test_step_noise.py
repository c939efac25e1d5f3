"""Noise of a step that belongs to the example, whatever the batch it comes in."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tda_lightning.tasks import numbered_draw, seeded_examples, watching_noise
from tda_lightning.tasks.step_noise import restart_noise

D = torch.distributions
MANY = 1500


def rate(x):
    return 1 + x.abs()


# Name: (function of x [batch, 4] that draws for each example, mean and variance of each number).
BY_EXAMPLE = {
    "rand": (lambda x: torch.rand(len(x), 3), 0.5, 1 / 12),
    "rand, double": (lambda x: torch.rand((len(x), 3), dtype=torch.float64), 0.5, 1 / 12),
    "rand_like": (torch.rand_like, 0.5, 1 / 12),
    "randn": (lambda x: torch.randn(size=(len(x), 2, 2)), 0.0, 1.0),
    "randn_like": (torch.randn_like, 0.0, 1.0),
    "randn, a generator": (
        lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), 0.0, 1.0
    ),
    "randint": (lambda x: torch.randint(3, 7, (len(x), 2)), 4.5, 1.25),
    "randint, no low": (lambda x: torch.randint(4, size=(len(x),)), 1.5, 1.25),
    "randint_like": (lambda x: torch.randint_like(x, 1, 5), 2.5, 1.25),
    "normal": (lambda x: torch.normal(0 * x + 2, 3.0), 2.0, 9.0),
    "normal, sizes": (lambda x: torch.normal(2.0, 3.0, (len(x), 2)), 2.0, 9.0),
    "normal, a mean": (lambda x: torch.normal(0 * x + 2), 2.0, 1.0),
    "normal, a deviation": (lambda x: torch.normal(2.0, 0 * x + 3), 2.0, 9.0),
    "bernoulli": (lambda x: torch.bernoulli(0 * x + 0.3), 0.3, 0.21),
    "bernoulli, a number": (lambda x: torch.bernoulli(x, 0.3), 0.3, 0.21),
    "x.bernoulli": (lambda x: (0 * x + 0.3).bernoulli(), 0.3, 0.21),
    "bernoulli_": (lambda x: torch.empty_like(x).bernoulli_(0.3), 0.3, 0.21),
    "normal_": (lambda x: torch.empty_like(x).normal_(1, 2), 1.0, 4.0),
    "uniform_": (lambda x: x.new_empty(len(x), 2).uniform_(1, 3), 2.0, 1 / 3),
    "exponential_": (lambda x: torch.empty_like(x).exponential_(2), 0.5, 0.25),
    "log_normal_": (
        lambda x: torch.empty_like(x).log_normal_(0, 0.5),
        math.exp(0.125), (math.exp(0.25) - 1) * math.exp(0.25),
    ),
    "geometric_": (lambda x: torch.empty_like(x).geometric_(0.5), 2.0, 2.0),
    "random_": (lambda x: torch.empty_like(x).random_(0, 4), 1.5, 1.25),
    "init.normal_": (lambda x: nn.init.normal_(torch.empty_like(x), 1, 2), 1.0, 4.0),
    "init.uniform_": (lambda x: nn.init.uniform_(torch.empty_like(x), 1, 3), 2.0, 1 / 3),
    "poisson": (lambda x: torch.poisson(0 * x + 3.5), 3.5, 3.5),
    "multinomial": (
        lambda x: torch.multinomial(torch.tensor([1.0, 0.0, 3.0]).expand(len(x), 3), 1), 1.5, 0.75
    ),
    "multinomial, again": (
        lambda x: torch.multinomial(torch.tensor([1.0, 0.0, 3.0]).expand(len(x), 3), 5, True),
        1.5, 0.75,
    ),
    "dropout": (lambda x: F.dropout(torch.ones_like(x), 0.2), 1.0, 0.25),
    "dropout1d": (lambda x: F.dropout1d(torch.ones(len(x), 3, 1), 0.2), 1.0, 0.25),
    "alpha_dropout": (lambda x: F.alpha_dropout(0 * x, 0.3, True), 0.0, None),
    "gumbel_softmax": (
        lambda x: F.gumbel_softmax(torch.tensor([0.0, 2.0, 1.0]).expand(len(x), 3), hard=True)
        @ torch.arange(3.0),
        (1 * math.exp(2) + 2 * math.e) / (1 + math.exp(2) + math.e), None,
    ),
    "Normal": (lambda x: D.Normal(0 * x + 1, 2.0).rsample(), 1.0, 4.0),
    "Laplace": (lambda x: D.Laplace(0 * x, 1.0).rsample(), 0.0, 2.0),
    "Gamma": (lambda x: D.Gamma(0 * x + 0.5, 2.0).rsample(), 0.25, 0.125),
    "Gamma, large": (lambda x: D.Gamma(0 * x + 5.0, 1.0).rsample(), 5.0, 5.0),
    "Beta": (lambda x: D.Beta(0 * x + 0.5, 0.5).sample(), 0.5, 0.125),
    "Dirichlet": (lambda x: D.Dirichlet(torch.ones_like(x)).sample(), 0.25, 3 / 80),
    "Categorical": (lambda x: D.Categorical(torch.ones_like(x)).sample(), 1.5, 1.25),
    "Exponential": (lambda x: D.Exponential(0 * x + 2).rsample(), 0.5, 0.25),
    "StudentT": (lambda x: D.StudentT(0 * x + 9).rsample(), 0.0, 9 / 7),
    "time first": (lambda x: torch.randn(3, len(x), 2).movedim(1, 0), 0.0, 1.0),
    "several rows": (lambda x: torch.randn(len(x) * 3, 2).unflatten(0, (len(x), 3)), 0.0, 1.0),
    "complex": (
        lambda x: torch.view_as_real(torch.randn(len(x), dtype=torch.complex64)), 0.0, 0.5
    ),
    "numpy": (lambda x: torch.from_numpy(np.random.randn(*x.shape)), 0.0, 1.0),  # noqa: NPY002
    "numpy, a size": (
        lambda x: torch.from_numpy(np.random.uniform(1, 3, size=(len(x), 2))),  # noqa: NPY002
        2.0, 1 / 3,
    ),
    "numpy, parameters": (
        lambda x: torch.from_numpy(np.random.normal(np.full(len(x), 2.0), 3.0)),  # noqa: NPY002
        2.0, 9.0,
    ),
    "numpy, a choice": (
        lambda x: torch.from_numpy(np.random.choice(4, (len(x), 2), p=[0.25] * 4)),  # noqa: NPY002
        1.5, 1.25,
    ),
    "numpy, integers": (
        lambda x: torch.from_numpy(np.random.randint(0, 4, len(x))), 1.5, 1.25,  # noqa: NPY002
    ),
}  # fmt: skip


def drawn(function, examples, draw=0):
    x = torch.linspace(-1, 1, 40).view(10, 4)
    with torch.no_grad(), numbered_draw(draw), seeded_examples(0, examples):
        return function(x[examples % 10])


def learn(function):
    """Batches of two sizes tell which axis holds the examples; once NumPy was seen to be used."""
    with watching_noise():
        for size in (7, 7, 6):
            drawn(function, torch.arange(size))


@pytest.mark.parametrize("name", BY_EXAMPLE)
def test_an_example_draws_the_same_in_every_batch(name):
    function, mean, variance = BY_EXAMPLE[name]
    learn(function)
    examples = torch.tensor([5, 2, 9, 7])
    whole = drawn(function, examples)
    assert torch.equal(drawn(function, examples.flip(0)).flip(0), whole)
    assert torch.equal(drawn(function, examples[2:3])[0], whole[2])
    assert not torch.equal(drawn(function, examples, draw=1), whole)
    many = drawn(function, torch.arange(MANY)).double().flatten()
    assert len(many.unique()) > 1
    spread = many.std() / len(many) ** 0.5
    assert abs(many.mean() - mean) < 5 * spread
    if variance is not None:
        assert many.var() == pytest.approx(variance, rel=0.3)


@pytest.mark.parametrize("name", ["randn_like", "Gamma", "poisson", "multinomial", "dropout"])
def test_examples_under_vmap_draw_the_same(name):
    function = BY_EXAMPLE[name][0]
    learn(function)
    examples = torch.tensor([5, 2, 9, 7])
    x = torch.linspace(-1, 1, 40).view(10, 4)

    def alone(own, example):
        with seeded_examples(0, example[None]):
            return function(own[None])[0]

    each = torch.func.vmap(alone)(x[examples], examples)
    assert torch.allclose(each, drawn(function, examples))


SHARED = {
    "rand": lambda x: torch.rand(1),
    "a scalar": lambda x: torch.rand(()),
    "Beta": lambda x: D.Beta(0.2, 0.2).sample(),
    "as long as a batch": lambda x: torch.randn(7),
    "randint": lambda x: torch.randint(0, 1000, (1,)),
    "numpy": lambda x: torch.tensor(np.random.beta(0.2, 0.2)),  # noqa: NPY002
    "python": lambda x: torch.tensor(random.random()),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_a_batch_shares_is_the_same_in_every_batch(name):
    function = SHARED[name]
    learn(function)
    examples = torch.tensor([5, 2, 9, 7])
    whole = drawn(function, examples)
    for other in (examples, examples[1:2], torch.arange(7)):
        assert torch.equal(drawn(function, other), whole)
    assert not torch.equal(drawn(function, examples, draw=1), whole)


def shuffled(x):
    order = list(range(len(x)))
    np.random.shuffle(order)  # noqa: NPY002
    return torch.tensor(order)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.randperm(len(x)),
        lambda x: torch.randperm(len(x), device="cpu", dtype=torch.int32).long(),
        lambda x: torch.randint(0, len(x), (len(x),)),
        lambda x: torch.randint(len(x), size=(len(x),)),
        lambda x: torch.from_numpy(np.random.permutation(len(x))),  # noqa: NPY002
        lambda x: torch.from_numpy(np.random.choice(len(x), len(x), replace=False)),  # noqa: NPY002
        lambda x: torch.from_numpy(np.random.randint(0, len(x), len(x))),  # noqa: NPY002
        shuffled,
    ],
)
def test_partners_are_the_same_in_whatever_order(function):
    learn(function)
    for examples in (torch.tensor([5, 2, 9, 7, 4]), torch.arange(7)):
        partners = examples[drawn(function, examples)]
        turned = examples.flip(0)
        assert torch.equal(turned[drawn(function, turned)].flip(0), partners)


def test_a_permutation_is_one():
    assert drawn(lambda x: torch.randperm(len(x)), torch.arange(50)).sort().values.tolist() == [
        *range(50)
    ]


def test_every_run_of_a_step_draws_the_same():
    with seeded_examples(0, torch.arange(4)):
        draws = []
        for _ in range(2):
            restart_noise()
            draws.append([torch.randn(4), torch.randn(4), torch.rand(())])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    assert not torch.equal(draws[0][0], draws[0][1])


def test_the_generators_are_left_as_they_were():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    learn(lambda x: (torch.randn_like(x), random.random(), np.random.rand()))  # noqa: NPY002
    with seeded_examples(0, torch.arange(3)):
        random.random(), np.random.rand()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_gradients_pass_through_samples():
    rate = torch.tensor([[2.0], [3.0]], requires_grad=True)
    with seeded_examples(0, torch.arange(2)):
        sample = D.Gamma(rate, 1.0).rsample()
    (slope,) = torch.autograd.grad(sample.sum(), rate)
    assert torch.allclose(slope, torch._standard_gamma_grad(rate, sample))


def test_what_is_drawn_is_told():
    with watching_noise() as seen:
        drawn(lambda x: x, torch.arange(4))
    assert not seen
    with watching_noise() as seen:
        drawn(
            lambda x: (torch.randn_like(x), torch.rand(1), torch.randperm(len(x))), torch.arange(4)
        )
    assert seen == {"example", "batch", "partners"}
    with watching_noise() as seen:
        drawn(lambda x: random.random(), torch.arange(4))
    assert seen == {"Python"}
