"""The oracles judge the library; here they are judged by each other and by what is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from tda_lightning.trajectory import Segment, Trajectory
from tests import oracles
from tests.cases import CASES, Case
from tests.cases.case import normal

OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.1),
    "decay": lambda m: torch.optim.SGD(m.parameters(), 0.1, weight_decay=0.05),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.05, 0.8, weight_decay=0.05),
    "dampening": lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.8, dampening=0.3),
    "nesterov": lambda m: torch.optim.SGD(
        m.parameters(), 0.05, 0.8, nesterov=True, weight_decay=0.05
    ),
    "adam": lambda m: torch.optim.Adam(m.parameters(), 0.02, (0.8, 0.9), weight_decay=0.05),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 0.02, (0.8, 0.9), weight_decay=0.5),
    "groups": lambda m: torch.optim.SGD(
        [
            {"params": [m[2].weight, m[2].bias], "lr": 0.02, "momentum": 0.5},
            {"params": [m[0].weight, m[0].bias], "weight_decay": 0.1},
        ],
        lr=0.1,
    ),
    "adamw_groups": lambda m: torch.optim.AdamW(
        [
            {"params": m[2].parameters(), "lr": 0.01, "weight_decay": 0.5},
            {"params": [m[0].weight]},
        ],
        lr=0.02,
    ),
}

MLP = Case("mlp", lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), normal(3))
CLASSIFIER = dataclasses.replace(MLP, name="classifier", kind="classification")
LINEAR = Case("linear", lambda: nn.Linear(3, 2), normal(3))


def train(
    case: Case, optimizer, *, batches=None, checkpoints=(), seed: int = 0, **options
) -> tuple[Trajectory, nn.Module, tuple]:
    module, data = case.build(), case.batch(10, seed)
    batches = oracles.cut_batches(10, 4, epochs=3, seed=seed) if batches is None else batches
    run = oracles.record_run(module, case.loss, data, optimizer, batches, checkpoints, **options)
    return run, module, data


def schedule(row: int) -> float:
    return 1 / (1 + 0.1 * row)


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


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replay_lands_on_torch_optim_and_its_derivative_on_differences(name, clip_norm) -> None:
    """Also with accumulated batches, an incomplete last group divided by the full count."""
    batches = oracles.cut_batches(10, 3, epochs=2, accumulate=2)
    batches[-1] = batches[-1][:1]
    run, module, data = train(
        MLP,
        OPTIMIZERS[name],
        batches=batches,
        accumulation=2,
        schedule=schedule,
        clip_norm=clip_norm,
    )
    queries = MLP.batch(3, seed=7)
    work = (run, module, MLP.loss, data)
    landed = oracles.replay(*work, torch.ones(10).double(), clip_norm=clip_norm)
    for parameter, tensor in run.checkpoints[run.last_step].parameters.items():
        torch.testing.assert_close(landed[parameter], tensor, rtol=1e-11, atol=1e-13)
    scores = oracles.unrolled(*work, MLP.loss, queries, clip_norm=clip_norm)
    for number in (0, 4):
        values = []
        for sign in (1, -1):
            weights = torch.ones(10).double()
            weights[number] += sign * 1e-5
            values.append(oracles.measure(*work, MLP.loss, queries, weights, clip_norm=clip_norm))
        difference = -(values[0] - values[1]) / 2e-5
        torch.testing.assert_close(scores[:, number], difference, rtol=1e-5, atol=1e-8)


def test_replay_of_zero_gradients_passes_none_on() -> None:
    """A coordinate whose second moment stays 0 has a finite derivative: 0."""
    run, module, (inputs, targets) = train(LINEAR, OPTIMIZERS["adam"])
    data = (inputs * torch.tensor([1.0, 0.0, 1.0]), targets)
    run = dataclasses.replace(run)  # the same steps, replayed on data with a dead feature
    run.steps.hyperparameters["weight_decay"].zero_()
    scores = oracles.unrolled(run, module, LINEAR.loss, data, LINEAR.loss, LINEAR.batch(2, seed=7))
    assert scores.isfinite().all()
    assert scores.abs().max() > 0


def slope(truth: torch.Tensor, scores: torch.Tensor) -> float:
    return float((scores * truth).sum() / scores.square().sum())


def correlation(truth: torch.Tensor, scores: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([truth.flatten(), scores.flatten()]))[0, 1])


def everything(case: Case, run: Trajectory, module: nn.Module, data: tuple, cuts):
    """Segments, their mean curvature, and all gradients that SOURCE asks for."""
    segments = run.segments(cuts)
    curvature = oracles.mean_curvature(run, segments, module, case.criterion, data)
    train_gradients = oracles.checkpoint_gradients(run, module, case.loss, data)
    last = [run.last_step]
    query = oracles.checkpoint_gradients(run, module, case.loss, case.batch(3, seed=7), last)
    return segments, curvature, train_gradients, query[run.last_step]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_source_is_the_product_of_small_steps(name) -> None:
    """The exponential against 2^20 multiplications by I - M / 2^20, done by squaring."""
    run, module, data = train(CLASSIFIER, OPTIMIZERS[name], checkpoints=(3, 6), schedule=schedule)
    segments, curvature, gradients, query = everything(CLASSIFIER, run, module, data, 2)
    scores = oracles.source_average(run, segments, curvature, gradients, query)
    steps, groups = run.steps, [fact.group for fact in run.facts.parameters.values()]
    sizes = [torch.Size(fact.shape).numel() for fact in run.facts.parameters.values()]
    carried, expected = query, []
    for segment, matrix in reversed(list(zip(segments, curvature, strict=True))):
        rows = segment.rows
        rate, decay = steps.learning_rate[rows], steps.hyperparameters["weight_decay"][rows]
        if run.facts.optimizer == "SGD":
            momentum = steps.hyperparameters["momentum"][rows]
            dampening = steps.hyperparameters["dampening"][rows]
            rate = rate * (1 - dampening) / (1 - momentum)
        scale = oracles.preconditioner(run, [run.checkpoints[s] for s in segment.checkpoints])
        moved, decay = (
            torch.cat([values[g].expand(n) for g, n in zip(groups, sizes, strict=True)])
            for values in (rate.sum(0), decay[0])
        )
        outer = torch.ones(()) if run.facts.optimizer == "AdamW" else scale
        exponent = torch.diag(moved) @ (torch.diag(scale) @ matrix + torch.diag(decay * outer))
        mean = torch.stack([gradients[step] for step in segment.checkpoints]).mean(0)
        taken = (moved * scale)[:, None] * mean.T / 2**20
        step = torch.eye(len(exponent)).double() - exponent / 2**20
        for _ in range(20):  # twice the steps: x <- step x + taken, repeated
            taken, step = taken + step @ taken, step @ step
        expected.append(carried @ taken / 10)
        carried = carried @ step
    torch.testing.assert_close(scores, torch.stack(expected[::-1]), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", ["momentum", "dampening", "groups"])
def test_source_without_curvature_is_tracin(kind) -> None:
    """One checkpoint per segment, measured at the last one's weights."""
    run, module, data = train(MLP, OPTIMIZERS[kind], checkpoints=(2, 5), schedule=schedule)
    run.steps.hyperparameters["weight_decay"].zero_()
    segments, curvature, gradients, query = everything(MLP, run, module, data, [2, 5])
    nothing = [torch.zeros_like(matrix) for matrix in curvature]
    source = oracles.source_average(run, segments, nothing, gradients, query)
    steps = [segment.stop for segment in segments]
    tracin = oracles.tracin(run, {s: gradients[s] for s in steps}, dict.fromkeys(steps, query))
    torch.testing.assert_close(source, tracin)


def test_source_after_endless_steps_is_the_influence_function() -> None:
    run, module, data = train(LINEAR, OPTIMIZERS["decay"])
    _, curvature, gradients, query = everything(LINEAR, run, module, data, 1)
    run.steps.learning_rate.mul_(1e4)
    segment = Segment(0, run.last_step, (run.last_step,))
    source = oracles.source_average(run, [segment], curvature, gradients, query)
    expected = oracles.influence(curvature[0], 0.05, 0.0, gradients[run.last_step], query)
    torch.testing.assert_close(source[0], expected)


def test_source_is_leave_one_out_on_a_quadratic() -> None:
    """Least squares by full batches: the derivative at once, retraining to the order 1/N."""
    steps, left_out, errors = 60, range(5), []
    for count in (20, 80):
        data, module, queries = LINEAR.batch(count), LINEAR.build(), LINEAR.batch(3, seed=7)
        run = oracles.record_run(
            module,
            LINEAR.loss,
            data,
            OPTIMIZERS["decay"],
            [[list(range(count))]] * steps,
            checkpoints=range(0, steps, 5),
        )
        segments, curvature, gradients, query = everything(LINEAR, run, module, data, 12)
        scores = oracles.source_average(run, segments, curvature, gradients, query).sum(0)
        work = (run, module, LINEAR.loss, data, LINEAR.loss, queries)
        assert abs(slope(oracles.unrolled(*work), scores) - 1) < 0.02
        removed = oracles.leave_one_out(*work, examples=left_out)
        errors.append(slope(removed, scores[:, left_out]) - 1)
        assert correlation(removed, scores[:, left_out]) > 0.98
    assert 0 < errors[1] < 0.4 * errors[0]
    assert errors[1] < 0.05


@pytest.mark.parametrize("name", ["sgd", "decay", "momentum", "dampening", "nesterov", "groups"])
def test_recorded_order_is_unrolling_where_curvature_is_constant(name) -> None:
    """Least squares by full batches, a checkpoint after every step: nothing is approximated."""
    optimizer = OPTIMIZERS[name]
    if name == "groups":
        optimizer = lambda m: torch.optim.SGD(  # noqa: E731
            [{"params": [m.bias], "lr": 0.02, "momentum": 0.5}, {"params": [m.weight]}], lr=0.1
        )
    whole = [[list(range(10))]] * 12
    run, module, data = train(
        LINEAR, optimizer, batches=whole, checkpoints=range(13), schedule=schedule
    )
    segments, curvature, gradients, query = everything(LINEAR, run, module, data, 3)
    scores = oracles.source_recorded(run, segments, curvature, gradients, query)
    truth = oracles.unrolled(run, module, LINEAR.loss, data, LINEAR.loss, LINEAR.batch(3, seed=7))
    torch.testing.assert_close(scores.sum(0), truth, rtol=1e-9, atol=1e-12)
    # The same gradients from every other checkpoint: close, and closer by interpolation.
    steps = range(0, 13, 4)
    errors = [
        (
            oracles.source_recorded(run, segments, curvature, gradients, query, by(steps)).sum(0)
            - truth
        )
        .norm()
        .div(truth.norm())
        for by in (oracles.interpolated, oracles.nearest)
    ]
    assert errors[0] < errors[1] < 0.5


def test_recorded_order_is_closer_to_unrolling_than_the_average() -> None:
    run, module, data = train(
        MLP,
        OPTIMIZERS["momentum"],
        batches=oracles.cut_batches(10, 2, epochs=5),
        checkpoints=range(0, 26, 5),
    )
    segments, curvature, gradients, query = everything(MLP, run, module, data, 5)
    truth = oracles.unrolled(run, module, MLP.loss, data, MLP.loss, MLP.batch(3, seed=7))
    average = oracles.source_average(run, segments, curvature, gradients, query).sum(0)
    work = (run, segments, curvature, gradients, query)
    recorded = oracles.source_recorded(*work).sum(0)
    blended = oracles.source_recorded(*work, oracles.interpolated(list(gradients))).sum(0)
    errors = [float((s - truth).norm() / truth.norm()) for s in (blended, recorded, average)]
    assert errors[0] < errors[2]
    assert errors[1] < errors[2]


def test_recorded_shares_count_accumulation_and_small_batches() -> None:
    batches = [[[0, 1, 1], [2]], [[3, 4]]]
    run, *_ = train(LINEAR, OPTIMIZERS["sgd"], batches=batches, accumulation=2)
    from tests.oracles.estimators import recorded_shares

    torch.testing.assert_close(
        recorded_shares(run, 0, 5), torch.tensor([1 / 6, 1 / 3, 1 / 2, 0, 0]).double()
    )
    torch.testing.assert_close(
        recorded_shares(run, 1, 5), torch.tensor([0, 0, 0, 1 / 4, 1 / 4]).double()
    )


def test_removal_is_the_centred_weight_zero_form() -> None:
    """METHODS.md, "Judging scores": s' = N / (N - 1) (s - mean s), for full batches."""
    data = LINEAR.batch(400)
    run = oracles.record_run(
        LINEAR.build(), LINEAR.loss, data, OPTIMIZERS["sgd"], [[list(range(400))]] * 10, ()
    )
    work = (run, LINEAR.build(), LINEAR.loss, data, LINEAR.loss, LINEAR.batch(2, seed=7))
    scores = oracles.unrolled(*work)
    weights = torch.ones(400).double()
    full = oracles.measure(*work, weights)
    for number in (0, 7):
        weights = torch.ones(400).double()
        weights[number] = 0
        removed = oracles.measure(*work, weights, renormalise=True) - full
        predicted = (scores[:, number] - scores.mean(1)) * 400 / 399
        torch.testing.assert_close(removed, predicted, rtol=0.05, atol=1e-5)


def test_leave_one_out_agrees_with_the_derivative_for_many_examples() -> None:
    run, module, data = train(MLP, OPTIMIZERS["nesterov"])
    work = (run, module, MLP.loss, data, MLP.loss, MLP.batch(2, seed=7))
    truth, scores = oracles.leave_one_out(*work), oracles.unrolled(*work)
    assert correlation(truth, scores) > 0.95


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


def test_preconditioner_reads_the_corrected_moment() -> None:
    """Against the definition, and 0 where nothing ever moved."""
    run, _, _ = train(LINEAR, OPTIMIZERS["adamw"], checkpoints=(2,))
    state = run.checkpoints[2].optimizer
    state["weight"]["exp_avg_sq"][0, 0] = 0
    found = oracles.preconditioner(run, [run.checkpoints[2]])
    second = torch.cat([state[name]["exp_avg_sq"].flatten() for name in run.facts.parameters])
    expected = 1 / ((second / (1 - 0.9**2)).sqrt() + 1e-8)
    assert found[0] == 0
    torch.testing.assert_close(found[1:], expected[1:])
    both = oracles.preconditioner(run, [run.checkpoints[2], run.checkpoints[run.last_step]])
    last = oracles.preconditioner(run, [run.checkpoints[run.last_step]])
    torch.testing.assert_close(both, (found + last) / 2)


def test_a_cast_run_is_the_same_run_rounded() -> None:
    run, _, _ = train(LINEAR, OPTIMIZERS["adam"], checkpoints=(2,))
    single = oracles.cast(run, torch.float32)
    assert {fact.dtype for fact in single.facts.parameters.values()} == {"float32"}
    for step, checkpoint in single.checkpoints.items():
        for name, tensor in checkpoint.parameters.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(
                tensor.double(), run.checkpoints[step].parameters[name], rtol=1e-6, atol=1e-6
            )
