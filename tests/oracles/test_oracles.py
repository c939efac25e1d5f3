"""The oracles of gradients and curvature, judged by each other and by what is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import oracles
from tests.cases import CASES, Case
from tests.cases.case import normal
from tests.cases.training import CLASSIFIER, LINEAR, OPTIMIZERS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_a_sound_problem(case: Case) -> None:
    """One example's outputs do not depend on another, and its gradients are parts of the whole."""
    module, batch = case.build(), case.batch()
    gradients = oracles.per_example_gradients(module, case.loss, batch)
    lookup = dict(module.named_parameters())
    assert list(gradients) == [name for name, p in lookup.items() if p.requires_grad]
    whole = torch.autograd.grad(
        case.loss(module, batch).sum(),
        [lookup[name] for name in gradients],
        allow_unused=True,
        materialize_grads=True,
    )
    for gradient, total in zip(gradients.values(), whole, strict=True):
        assert gradient.dtype == torch.float64
        torch.testing.assert_close(gradient.sum(0), total, rtol=1e-10, atol=1e-12)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


def test_losses_are_torchs_own() -> None:
    logits, labels = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
    labels[1, 2:] = -100
    expected = [nn.functional.cross_entropy(logits[n], labels[n]) for n in range(2)]
    torch.testing.assert_close(oracles.cross_entropy(logits, labels), torch.stack(expected))
    targets = torch.randn(2, 5, 3)
    expected = [nn.functional.mse_loss(logits[n], targets[n]) for n in range(2)]
    torch.testing.assert_close(oracles.mean_squared_error(logits, targets), torch.stack(expected))


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_gauss_newton_of_a_linear_model_is_the_hessian(kind) -> None:
    case = Case("positions", lambda: nn.Linear(2, 3), normal(4, 2), kind)
    module, data = case.build(), case.batch(5)
    torch.testing.assert_close(
        oracles.gauss_newton(module, case.criterion, data),
        oracles.loss_hessian(module, case.loss, data),
    )


def test_gauss_newton_is_the_fisher_of_expected_labels() -> None:
    module, (inputs, _) = CLASSIFIER.build(), CLASSIFIER.batch(4)
    chances = module(inputs).softmax(-1).detach()
    total = 0
    for label in range(2):
        labels = torch.full((4,), label)
        rows = oracles.per_example_gradients(module, CLASSIFIER.loss, (inputs, labels))
        weighted = oracles.flatten(rows, rows) * chances[:, label, None].sqrt()
        total = total + oracles.second_moment(weighted)
    torch.testing.assert_close(
        oracles.gauss_newton(module, CLASSIFIER.criterion, (inputs, torch.zeros(4).long())), total
    )


CONVOLUTIONS = [
    case
    for case in CASES
    if case.name.startswith("conv/")
    and isinstance(case.build()[0], nn.Conv1d | nn.Conv2d | nn.Conv3d)
    and case.name not in ("conv/weight_frozen", "conv/network")
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.name)
def test_positions_of_a_convolution_make_its_gradient(case: Case) -> None:
    """sum_t b_t [a_t, 1]^T over unfolded windows is what autograd says, in the same layout."""
    module, data = case.build(), case.batch(1)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    gradient = oracles.flatten(
        oracles.per_example_gradients(module, case.loss, data, names), names
    )[0]
    places = oracles.layer_coordinates(module, "0", names)
    pairs = oracles.layer_positions(
        module, "0", lambda m: case.loss(m, data).sum(), "0.bias" in names
    )
    assert len(places) == len(pairs) == module[0].groups
    assert sorted(torch.cat([p.flatten() for p in places]).tolist()) == list(range(len(gradient)))
    for place, (a, b) in zip(places, pairs, strict=True):
        torch.testing.assert_close(b.T @ a, gradient[place], rtol=1e-9, atol=1e-13)


def test_ekfac_is_exact_where_the_fisher_is_a_kronecker_product() -> None:
    """Every input with every label: a and b are independent, by design."""
    torch.manual_seed(0)
    inputs = torch.randn(4, 3).double().repeat_interleave(5, 0)
    noise = torch.randn(5, 2).double().repeat(4, 1)
    module = LINEAR.build()
    targets = (module(inputs) - noise).detach()

    def example_loss(net: nn.Module, n: int) -> torch.Tensor:
        return LINEAR.loss(net, (inputs[n : n + 1], targets[n : n + 1])).sum()

    names = ["bias", "weight"]
    (block,) = oracles.kronecker_blocks(module, "", example_loss, 20, names)
    rows = oracles.per_example_gradients(module, LINEAR.loss, (inputs, targets), names)
    fisher = oracles.second_moment(oracles.flatten(rows, names))
    for kfac in (False, True):
        torch.testing.assert_close(oracles.embed_blocks([block], 8, kfac=kfac), fisher)


@pytest.mark.parametrize(
    "name", ["linear/positions_classification", "conv/2d_groups", "conv/network", "shared/blocks"]
)
def test_ekfac_keeps_the_diagonal_in_its_basis_and_pools_checkpoints(name) -> None:
    """Trace as the Fisher's; two equal checkpoints as one; scaling by 1 changes no trace."""
    case = next(case for case in CASES if case.name == name)
    module, data = case.build(), case.batch(6)
    run = oracles.record_run(module, case.loss, data, OPTIMIZERS["sgd"], [[[0]]], ())
    names = list(run.facts.parameters)
    sizes = [torch.Size(fact.shape).numel() for fact in run.facts.parameters.values()]
    layers = [
        layer for layer, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)
    ]
    places = dict(zip(names, torch.arange(sum(sizes)).split(sizes), strict=True))

    def example_loss(net: nn.Module, n: int) -> torch.Tensor:
        return case.loss(net, oracles.take(data, [n])).sum()

    rows = oracles.per_example_gradients(module, case.loss, data, names)
    fisher = oracles.second_moment(oracles.flatten(rows, names))
    rest = [place for name, place in places.items() if name.rpartition(".")[0] not in layers]
    dense = [(place, fisher[place][:, place]) for place in rest]
    start = run.checkpoints[0]
    once, twice, scaled = (
        oracles.embed_blocks(
            [
                block
                for layer in layers
                for block in oracles.kronecker_blocks(
                    module, layer, example_loss, 6, names, states, scale
                )
            ],
            sum(sizes),
            dense,
        )
        for states, scale in (
            (None, None),
            ([start, start], None),
            (None, torch.ones(sum(sizes)).double()),
        )
    )
    torch.testing.assert_close(once.trace(), fisher.trace())
    torch.testing.assert_close(scaled.trace(), fisher.trace())
    torch.testing.assert_close(once, twice)
    torch.testing.assert_close(once, once.T)
    assert torch.linalg.eigvalsh(once).min() > -1e-12
