"""The oracles of whole runs: SOURCE, TracIn, influence and unrolling, judged by each other."""

from __future__ import annotations

import pytest
import torch

from tda_lightning.records.trajectory import Segment
from tests import oracles
from tests.cases.training import (
    CLASSIFIER,
    LINEAR,
    MLP,
    OPTIMIZERS,
    everything,
    queries_of,
    schedule,
    train,
)


def slope(truth: torch.Tensor, scores: torch.Tensor) -> float:
    return float((scores * truth).sum() / scores.square().sum())


def correlation(truth: torch.Tensor, scores: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([truth.flatten(), scores.flatten()]))[0, 1])


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
    queries = queries_of(MLP)
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
    run.steps.hyperparameters["weight_decay"].zero_()
    scores = oracles.unrolled(run, module, LINEAR.loss, data, LINEAR.loss, LINEAR.batch(2, seed=7))
    assert scores.isfinite().all()
    assert scores.abs().max() > 0


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
    steps, left_out, errors = 60, range(3), []
    for count in (20, 80):
        data, module, queries = LINEAR.batch(count), LINEAR.build(), queries_of(LINEAR)
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
    truth = oracles.unrolled(run, module, LINEAR.loss, data, LINEAR.loss, queries_of(LINEAR))
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


@pytest.mark.parametrize("name", ["sgd", "decay", "momentum", "dampening", "nesterov", "groups"])
def test_recorded_order_with_every_steps_own_hessian_is_unrolling(name) -> None:
    """A segment, a checkpoint and the batch's true Hessian per step: no approximation is left."""
    batches = oracles.cut_batches(10, 4, epochs=4)
    steps = range(len(batches) + 1)
    run, module, data = train(
        MLP, OPTIMIZERS[name], batches=batches, checkpoints=steps, schedule=schedule
    )
    names = list(run.facts.parameters)
    hessians = [
        oracles.loss_hessian(
            oracles.with_state(module, run.checkpoints[row]),
            MLP.loss,
            oracles.take(data, batch),
            names,
        )
        for row, (batch,) in enumerate(batches)
    ]
    segments, _, gradients, query = everything(MLP, run, module, data, list(steps[1:-1]))
    scores = oracles.source_recorded(run, segments, hessians, gradients, query)
    truth = oracles.unrolled(run, module, MLP.loss, data, MLP.loss, queries_of(MLP))
    torch.testing.assert_close(scores.sum(0), truth, rtol=1e-10, atol=1e-13)


def test_recorded_order_is_closer_to_unrolling_than_the_average() -> None:
    run, module, data = train(
        MLP,
        OPTIMIZERS["momentum"],
        batches=oracles.cut_batches(10, 2, epochs=5),
        checkpoints=range(0, 26, 5),
    )
    segments, curvature, gradients, query = everything(MLP, run, module, data, 5)
    truth = oracles.unrolled(run, module, MLP.loss, data, MLP.loss, queries_of(MLP))
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
    torch.testing.assert_close(
        oracles.recorded_shares(run, 0, 5), torch.tensor([1 / 6, 1 / 3, 1 / 2, 0, 0]).double()
    )
    torch.testing.assert_close(
        oracles.recorded_shares(run, 1, 5), torch.tensor([0, 0, 0, 1 / 4, 1 / 4]).double()
    )


def test_removal_is_the_centred_weight_zero_form() -> None:
    """docs/methods.md, "Judging scores": s' = N / (N - 1) (s - mean s), for full batches."""
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
