"""Every estimator against dense oracles in float64, and against what is known of its limits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tda_lightning.estimators import TRAK, InfluenceFunction, Source, TracIn
from tda_lightning.records.errors import UnsupportedTrainingError
from tests import oracles
from tests.attributing import CaseTask, attribute, in_float32, relative, slope
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
from tests.oracles.estimators import spread
from tests.quick import quick

KINDS = {"regression": MLP, "classification": CLASSIFIER}
CHECKPOINTS = (2, 3, 5, 6)
SGD = [name for name in OPTIMIZERS if "adam" not in name]
# "momentum" decays its weights too, and "dampening" does not.
MOST = quick(OPTIMIZERS, set(OPTIMIZERS) - {"sgd", "decay"})


def require_agreement(scores, expected, case, run, module, data, estimator) -> None:
    """1e-9 in float64 with slope 1, 1e-4 in float32."""
    assert scores.values.dtype == torch.float64
    assert relative(scores.by_segment, expected) < 1e-9
    assert abs(slope(scores.values, expected.sum(0)) - 1) < 1e-9
    torch.testing.assert_close(scores.values, scores.by_segment.sum(0))
    single, module, (data, queries) = in_float32(run, module, data, queries_of(case))
    rounded = attribute(case, single, module, data, estimator, queries=queries)
    assert rounded.values.dtype == torch.float32
    assert relative(rounded.by_segment, expected) < 1e-4
    assert abs(slope(rounded.values, expected.sum(0)) - 1) < 1e-4


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("kind", KINDS)
def test_source(kind, name) -> None:
    case = KINDS[kind]
    run, module, data = train(case, OPTIMIZERS[name], checkpoints=CHECKPOINTS, schedule=schedule)
    for cuts in ({"num_segments": 2}, {"num_segments": 1}, {"segment_steps": [3, 5]}):
        estimator = Source(curvature="exact", **cuts)
        expected = oracles.source_average(
            run, *everything(case, run, module, data, estimator.cuts())
        )
        scores = attribute(case, run, module, data, estimator)
        assert relative(scores.by_segment, expected) < 1e-9
    require_agreement(scores, expected, case, run, module, data, estimator)


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("kind", KINDS)
def test_tracin(kind, name) -> None:
    case = KINDS[kind]
    run, module, data = train(case, OPTIMIZERS[name], checkpoints=CHECKPOINTS, schedule=schedule)
    steps = [step for step in sorted(run.checkpoints) if step]
    gradients = oracles.checkpoint_gradients(run, module, case.loss, data, steps)
    queries = oracles.checkpoint_gradients(run, module, case.loss, queries_of(case), steps)
    expected = oracles.tracin(run, gradients, queries)
    scores = attribute(case, run, module, data, TracIn())
    assert scores.provenance["segments"] == [[0, 2], [2, 3], [3, 5], [5, 6], [6, 9]]
    require_agreement(scores, expected, case, run, module, data, TracIn())


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("kind", KINDS)
def test_influence_function(kind, name) -> None:
    case = KINDS[kind]
    run, module, data = train(case, OPTIMIZERS[name], checkpoints=CHECKPOINTS)
    last = run.last_step
    (curvature,) = oracles.mean_curvature(
        run, run.segments([last - 1])[1:], module, case.criterion, data
    )
    _, _, gradients, query = everything(case, run, module, data, 1)
    decay = spread(run, run.steps.hyperparameters["weight_decay"][-1])
    mean = float(curvature.diagonal().mean())
    for options, damping in (
        ({}, 0.1 * mean),
        ({"damping": 0.03}, 0.03),
        ({"relative_damping": 0.5}, 0.5 * mean),
    ):
        expected = oracles.influence(curvature, decay, damping, gradients[last], query)
        estimator = InfluenceFunction("exact", **options)
        scores = attribute(case, run, module, data, estimator)
        assert scores.by_segment is None
        assert relative(scores.values, expected) < 1e-9
        assert abs(slope(scores.values, expected) - 1) < 1e-9
    single, module, (data, queries) = in_float32(run, module, data, queries_of(case))
    scores = attribute(case, single, module, data, estimator, queries=queries)
    assert scores.values.dtype == torch.float32
    assert relative(scores.values, expected) < 1e-4


def rates(module: torch.nn.Module) -> torch.optim.Optimizer:
    """Groups with their own rates, decay and one momentum."""
    return torch.optim.SGD(
        [
            {"params": [module[2].weight, module[2].bias], "lr": 0.02},
            {"params": [module[0].weight, module[0].bias], "weight_decay": 0.1},
        ],
        lr=0.1,
        momentum=0.5,
    )


FOLLOWED = {**{name: OPTIMIZERS[name] for name in SGD if name != "groups"}, "rates": rates}


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_order(kind, name) -> None:
    """The recursion over the recorded steps, gradients interpolated between checkpoints."""
    case = KINDS[kind]
    run, module, data = train(
        case, FOLLOWED[name], checkpoints=CHECKPOINTS, schedule=schedule, batches=BATCHES
    )
    weights = oracles.interpolated(sorted(run.checkpoints))
    for cuts in ({"num_segments": 1}, {"segment_steps": [4, 5]}):
        estimator = Source(curvature="exact", order="recorded", **cuts)
        work = everything(case, run, module, data, estimator.cuts())
        expected = oracles.source_recorded(run, *work, weights=weights)
        scores = attribute(case, run, module, data, estimator, batch_size=3)
        assert relative(scores.by_segment, expected) < 1e-9
    require_agreement(scores, expected, case, run, module, data, estimator)


# Accumulated and uneven batches, an example used twice in one, an incomplete last group.
BATCHES = [
    *oracles.cut_batches(10, 3, epochs=2, accumulate=2),
    [[0, 0, 1], [2]],
    *oracles.cut_batches(10, 4, epochs=1, seed=4),
]


@pytest.mark.parametrize("name", FOLLOWED)
def test_momentum_followed_step_by_step(name) -> None:
    """Even use of every example, but the buffer's warm-up exact."""
    run, module, data = train(MLP, FOLLOWED[name], checkpoints=CHECKPOINTS, schedule=schedule)
    estimator = Source(segment_steps=[3], curvature="exact", momentum="recursion")
    work = everything(MLP, run, module, data, [3])

    def weights(row: int) -> dict[int, float]:
        (own,) = [s.checkpoints for s in work[0] if s.start <= row < s.stop]
        return dict.fromkeys(own, 1 / len(own))

    def shares(row: int) -> torch.Tensor:
        return torch.full((10,), 1 / 10, dtype=torch.float64)

    expected = oracles.source_recorded(run, *work, weights=weights, shares=shares)
    scores = attribute(MLP, run, module, data, estimator)
    require_agreement(scores, expected, MLP, run, module, data, estimator)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_following_momentum_changes_nothing_for_adam(name) -> None:
    run, module, data = train(MLP, OPTIMIZERS[name], checkpoints=CHECKPOINTS)
    plain, followed = (
        attribute(MLP, run, module, data, Source(2, curvature="exact", momentum=momentum))
        for momentum in ("effective_rate", "recursion")
    )
    torch.testing.assert_close(plain.values, followed.values)


@pytest.mark.parametrize("key", ["momentum", "dampening", "nesterov"])
def test_the_buffer_of_groups_that_differ_is_refused_before_any_pass(key) -> None:
    def optimizer(module):
        groups = [{"params": module[2].parameters()}, {"params": module[0].parameters()}]
        groups[0][key] = {"momentum": 0.5, "dampening": 0.3, "nesterov": False}[key]
        nesterov = key == "nesterov"
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov)

    run, module, data = train(MLP, optimizer)
    for options in ({"order": "recorded"}, {"momentum": "recursion"}):
        with pytest.raises(UnsupportedTrainingError, match=f"groups have different {key}"):
            attribute(MLP, run, module, data, Source(1, curvature="exact", **options))
    assert not run.curvature
    assert attribute(MLP, run, module, data, Source(1, curvature="exact")).values.isfinite().all()


@pytest.mark.parametrize("name", [*FOLLOWED, "adam", "adamw"])
def test_recorded_order_is_exact_unrolling_where_curvature_is_constant(name) -> None:
    """Least squares by full batches, a checkpoint after every step: nothing is approximated. For
    Adam a segment for every step too, because it is h H h that stays the same within one."""
    optimizer = {**FOLLOWED, **OPTIMIZERS}[name]
    if name == "rates":
        optimizer = lambda m: torch.optim.SGD(  # noqa: E731
            [{"params": [m.bias], "lr": 0.02}, {"params": [m.weight], "weight_decay": 0.1}],
            lr=0.1,
            momentum=0.5,
        )
    whole = [[list(range(10))]] * 12
    run, module, data = train(
        LINEAR, optimizer, batches=whole, checkpoints=range(13), schedule=schedule
    )
    truth = oracles.unrolled(run, module, LINEAR.loss, data, LINEAR.loss, queries_of(LINEAR))
    segments = 12 if name.startswith("adam") else 3
    estimator = Source(segments, curvature="exact", order="recorded")
    scores = attribute(LINEAR, run, module, data, estimator)
    assert relative(scores.values, truth) < 1e-9


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_recorded_order_is_closer_to_unrolling_than_the_average(name) -> None:
    batches = oracles.cut_batches(10, 2, epochs=5)
    run, module, data = train(MLP, OPTIMIZERS[name], batches=batches, checkpoints=range(0, 26, 5))
    truth = oracles.unrolled(run, module, MLP.loss, data, MLP.loss, queries_of(MLP))
    average, recorded = (
        relative(
            attribute(MLP, run, module, data, Source(5, curvature="exact", order=order)).values,
            truth,
        )
        for order in ("average", "recorded")
    )
    # With the curvature of a few checkpoints for a nonlinear model, not all of the rest goes.
    assert recorded < (0.9 if name == "momentum" else 0.4) * average
    assert recorded < 0.35


@pytest.mark.parametrize(
    "name",
    quick([n for n in OPTIMIZERS if "groups" not in n], ["dampening", "nesterov", "adam", "adamw"]),
)
def test_recorded_order_takes_clipped_gradients_times_their_factor(name) -> None:
    """As above, clipped: exact unrolling in which the factors are constants."""
    whole = [[list(range(10))]] * 12
    run, module, data = train(
        LINEAR, OPTIMIZERS[name], batches=whole, checkpoints=range(13), clip_norm=0.3
    )
    assert 0 < float((run.steps.clipping < 1).double().mean()) <= 1
    work = (run, module, LINEAR.loss, data, LINEAR.loss, queries_of(LINEAR))
    truth = oracles.unrolled(*work, recorded_clipping=True)
    estimator = Source(12, curvature="exact", order="recorded")
    scores = attribute(LINEAR, run, module, data, estimator)
    assert relative(scores.values, truth) < 1e-9
    unclipped = dataclasses.replace(run.steps, clipping=torch.ones(12).double())
    ignored = attribute(LINEAR, dataclasses.replace(run, steps=unclipped), module, data, estimator)
    assert relative(ignored.values, truth) > 0.1


CLIPPED = ("sgd", "decay", "momentum", "nesterov", "adam", "adamw")
CLIPPING: list[Any] = [{"clip_norm": 0.3}, {"clip_norm": 1.0}, {"clip_value": 0.1}]
# Every way of clipping once.
ONCE = [*zip(("momentum", "adamw", "sgd"), CLIPPING, strict=True), ("adamw", CLIPPING[0])]


@pytest.mark.parametrize(
    ("name", "how"),
    quick([(name, how) for how in CLIPPING for name in CLIPPED], ONCE),
)
def test_the_factor_of_clipping_is_nearer_to_unrolling_than_ignoring_it(name, how) -> None:
    batches = oracles.cut_batches(10, 2, epochs=5)
    run, module, data = train(
        MLP, OPTIMIZERS[name], batches=batches, checkpoints=range(0, 26, 5), **how
    )
    truth = oracles.unrolled(run, module, MLP.loss, data, MLP.loss, queries_of(MLP), **how)
    unclipped = dataclasses.replace(run.steps, clipping=torch.ones(len(run.steps)).double())
    estimators = [Source(5, curvature="exact", order=order) for order in ("average", "recorded")]
    if name not in ("adam", "adamw"):
        estimators.append(TracIn())
    for estimator in estimators:
        counted, ignored = (
            relative(
                attribute(
                    MLP, dataclasses.replace(run, steps=steps), module, data, estimator
                ).values,
                truth,
            )
            for steps in (run.steps, unclipped)
        )
        assert counted < ignored


def test_what_clipping_did_is_noted() -> None:
    run, module, data = train(MLP, OPTIMIZERS["sgd"], clip_norm=0.5)
    acted = run.steps.clipping != 1
    said = f"by norm acted in {int(acted.sum())} of {len(run.steps)} steps, mean factor "
    for estimator, treated in (
        (TracIn(), True),
        (Source(1), True),
        (InfluenceFunction(), False),
    ):
        notes = attribute(MLP, run, module, data, estimator).provenance["notes"]
        found = [note for note in notes if said in note]
        assert len(found) == 1, notes
        assert ("times the step's factor" in found[0]) == treated
        assert "neglected" in found[0]
    adam, module, data = train(MLP, OPTIMIZERS["adam"], clip_norm=0.5)
    notes = attribute(MLP, adam, module, data, TracIn()).provenance["notes"]
    assert "Adam normalises gradient scale away" in str(notes)
    plain, module, data = train(MLP, OPTIMIZERS["sgd"])
    assert "lipping" not in str(attribute(MLP, plain, module, data, Source(1)).provenance)


ESTIMATORS = {
    "tracin": TracIn(),
    "influence exact": InfluenceFunction("exact"),
    "influence ekfac": InfluenceFunction(),
    "influence kfac": InfluenceFunction("kfac"),
    "influence diagonal": InfluenceFunction("diagonal", damping=0.1),
    "influence identity": InfluenceFunction("identity"),
    "source exact": Source(2, curvature="exact"),
    "source ekfac": Source(2),
    "source kfac": Source(2, curvature="kfac"),
    "source diagonal": Source(2, curvature="diagonal"),
    "source identity": Source(2, curvature="identity"),
    "source recorded": Source(2, order="recorded"),
    "source recursion": Source(2, momentum="recursion"),
    "trak": TRAK(projection_dimension=4),
}


@functools.cache
def trained_and_unrolled(optimizer: str) -> tuple[Any, Tensor]:
    run, module, data = train(CLASSIFIER, OPTIMIZERS[optimizer], checkpoints=CHECKPOINTS)
    work = (run, module, CLASSIFIER.loss, data, CLASSIFIER.loss, queries_of(CLASSIFIER))
    return (run, module, data), oracles.unrolled(*work)


# Other curvature of blocks: it has tests of its own, and here the same code around it.
ALIKE = {"influence kfac", "influence identity", "source kfac", "source identity"}


@pytest.mark.parametrize("optimizer", ["momentum", "adamw_groups"])
@pytest.mark.parametrize("name", quick(ESTIMATORS, set(ESTIMATORS) - ALIKE))
def test_every_estimator_keeps_the_contract(name, optimizer) -> None:
    """Shapes, type, sign, unit, repeatability, and an example as its own query."""
    estimator, adam = ESTIMATORS[name], optimizer != "momentum"
    (run, module, data), truth = trained_and_unrolled(optimizer)
    run, queries = dataclasses.replace(run, curvature={}), queries_of(CLASSIFIER)
    work = (CLASSIFIER, run, module, data, estimator)
    scores = attribute(*work)
    segments = scores.by_segment
    assert scores.values.shape == (3, 10)
    assert scores.values.dtype == torch.float64
    assert scores.values.isfinite().all() and scores.values.abs().max() > 0
    if name.startswith(("influence", "trak")):
        assert segments is None
    else:
        assert segments.shape == (5 if name == "tracin" else 2, 3, 10)
        assert len(scores.provenance["segments"]) == len(segments)
        torch.testing.assert_close(segments.sum(0), scores.values)
    # The same again, also when other queries and other batches keep it company.
    assert torch.equal(attribute(*work).values, scores.values)
    both = tuple(torch.cat([a, b]) for a, b in zip(data, queries, strict=True))
    company = attribute(*work, queries=both, batch_size=3)
    torch.testing.assert_close(company.values[10:], scores.values)
    # Unit: proportional to what is measured.
    thrice = attribute(*work, task=CaseTask("classification", factor=3))
    torch.testing.assert_close(thrice.values, 3 * scores.values)
    # Sign and size: an example lowers its own loss; what training again by exact derivatives says.
    assert company.values[:, :10].diagonal().mean() > 0
    both = torch.stack([scores.values.flatten(), truth.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.3  # an influence function of a run cut short
    # Self-influence is the diagonal of the training set as its own queries.
    for task in (None, CaseTask("classification", margin=True)):
        own = attribute(*work, queries=data, task=task)
        if adam and estimator == Source(2, order="recorded"):
            assert own.self_influence is None
            assert any("No self-influence" in note for note in own.provenance["notes"])
        else:
            torch.testing.assert_close(own.self_influence, own.values.diagonal())
    assert attribute(*work, self_influence=False).self_influence is None


@pytest.mark.parametrize("curvature", ["exact", "ekfac"])
@pytest.mark.parametrize("name", ["momentum", "dampening", "groups"])
def test_source_of_a_short_time_is_tracin_of_one_checkpoint(name, curvature) -> None:
    run, module, data = train(MLP, OPTIMIZERS[name])
    run.steps.learning_rate.mul_(1e-9)
    source = attribute(MLP, run, module, data, Source(1, curvature=curvature))
    tracin = attribute(MLP, run, module, data, TracIn())
    torch.testing.assert_close(source.by_segment, tracin.by_segment, rtol=1e-6, atol=0)
    torch.testing.assert_close(source.self_influence, tracin.self_influence, rtol=1e-6, atol=0)


@pytest.mark.parametrize("curvature", ["exact", "ekfac", "kfac", "diagonal", "identity"])
def test_source_of_endless_steps_is_the_undamped_influence_function(curvature) -> None:
    run, module, data = train(MLP, OPTIMIZERS["decay"])
    run.steps.learning_rate.mul_(1e6)
    estimator = Source(1, curvature=curvature, leading_directions=0)
    source = attribute(MLP, run, module, data, estimator)
    influence = attribute(MLP, run, module, data, InfluenceFunction(curvature, damping=0.0))
    torch.testing.assert_close(source.values, influence.values)
    torch.testing.assert_close(source.self_influence, influence.self_influence)


def test_without_curvature_segments_only_split_the_time() -> None:
    """Gradients that do not change, no decay: however it is cut, SOURCE is TracIn."""
    run, module, data = train(LINEAR, OPTIMIZERS["sgd"], checkpoints=range(10))
    run.steps.learning_rate.mul_(1e-9)
    for step in run.checkpoints:
        run.checkpoints[step].parameters.update(run.checkpoints[9].parameters)
    whole = attribute(LINEAR, run, module, data, Source(1))
    cut = attribute(LINEAR, run, module, data, Source(segment_steps=[2, 3, 7]))
    torch.testing.assert_close(whole.values, cut.values, rtol=1e-6, atol=0)
    rates = torch.tensor([2.0, 1.0, 4.0, 2.0]).double() / 9
    torch.testing.assert_close(
        cut.by_segment, rates[:, None, None] * whole.values, rtol=1e-6, atol=0
    )


def test_a_changing_ratio_of_rates_is_noted() -> None:
    """Rates that a schedule moves together keep it; one that is frozen halfway does not."""

    def notes(run, estimator) -> list[str]:
        scores = attribute(MLP, run, module, data, estimator)
        return [note for note in scores.provenance["notes"] if "change their ratio" in note]

    cut = {"segment_steps": [4], "leading_directions": 0}
    for optimizer in (rates, OPTIMIZERS["adamw_groups"]):
        run, module, data = train(MLP, optimizer, checkpoints=CHECKPOINTS, schedule=schedule)
        adam = optimizer is not rates
        assert notes(run, Source(**cut)) == []
        run.steps.learning_rate[6:, 1] = 0
        (note,) = notes(run, Source(**cut))
        assert "within segment 2:" in note
        # The recorded order of Adam takes each group's rate at each step.
        assert len(notes(run, Source(order="recorded", **cut))) == (0 if adam else 1)
        run.steps.learning_rate[1, 0] *= 2
        assert "within segment 1, 2:" in notes(run, Source(**cut))[0]
        assert "within segment 1:" in notes(run, Source(1, leading_directions=0))[0]
        task = CaseTask(MLP.kind)
        task.layers = ["0"]
        assert not any(
            "change their ratio" in note
            for note in attribute(MLP, run, module, data, Source(1), task=task).provenance["notes"]
        )
