"""Attribution through several stages of training, against unrolling and dense oracles."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tda_lightning.estimators.source.segments import FittedSegment
from tda_lightning.records.errors import (
    EngineError,
    TrajectoryMismatchError,
    TrajectoryNotFoundError,
    UnsupportedTrainingError,
)
from tests import oracles
from tests.attributing import CaseTask, quiet, relative, slope
from tests.cases.training import MLP, OPTIMIZERS, train
from tests.oracles.stages import TrainedStage, frozen_names, source_stages, unrolled_stages
from tests.processes import results
from tests.quick import quick

KINDS = {"regression": oracles.mean_squared_error, "classification": oracles.cross_entropy}
SGD, MOMENTUM = OPTIMIZERS["sgd"], OPTIMIZERS["momentum"]


class Net(nn.Module):
    """A trunk and a head; ``join`` puts a linear branch beside it, so that both are linear."""

    def __init__(self, outputs: int, seed: int, linear: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = linear
        self.trunk = nn.Linear(3, 2 if linear else 4)
        self.head = nn.Linear(3 if linear else 4, outputs)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.linear:
            return self.head(inputs) + self.trunk(inputs)[:, : self.head.out_features]
        return self.head(self.trunk(inputs).tanh())


def batch(size: int, outputs: int, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    if kind == "classification":
        return inputs, torch.randint(outputs, (size,), generator=generator)
    return inputs, torch.randn(size, outputs, generator=generator, dtype=torch.float64)


@dataclasses.dataclass
class Problem:
    """Stages with their tasks and the last one's queries."""

    stages: list[TrainedStage]
    tasks: list[CaseTask]
    queries: tuple[Tensor, Tensor]

    def scores(self, estimator, trainer=None, **options) -> Scores:
        attribution = AttributionModule(
            [stage.module for stage in self.stages],
            [stage.trajectory for stage in self.stages],
            estimator,
            self.tasks,
        )
        return attribution.attribute(
            [TensorDataset(*stage.data) for stage in self.stages],
            TensorDataset(*self.queries),
            batch_size=4,
            trainer=trainer or quiet(),
            **options,
        )

    def unrolled(self) -> Tensor:
        return torch.cat(unrolled_stages(self.stages, self.stages[-1].loss, self.queries), 1)


# (examples, outputs, kind, steps) of each stage: different N, loss and head.
DIFFERENT = ((10, 2, "regression", 8), (6, 3, "classification", 6))
SAME_LOSS = ((10, 2, "regression", 8), (6, 2, "regression", 6))


def problem(
    plan: tuple = DIFFERENT,
    optimizers: tuple[Callable, ...] = (SGD, SGD),
    frozen: bool = True,
    linear: bool = False,
    batches: int | None = None,
    checkpoints: Callable[[int], range] = lambda steps: range(0, steps, 2),
) -> Problem:
    """Train the stages one after another; each inherits what has the same name and shape.

    Args:
        frozen: all stages but the first keep the trunk as it is.
        batches: batch size; all examples if None.
    """
    stages: list[TrainedStage] = []
    tasks: list[CaseTask] = []
    for number, ((size, outputs, kind, steps), optimizer) in enumerate(
        zip(plan, optimizers, strict=True)
    ):
        module = Net(outputs, number, linear)
        if stages:
            before = stages[-1].trajectory
            end = before.checkpoints[before.last_step]
            own = module.state_dict()
            known = {**end.buffers, **end.parameters}
            own.update({k: v for k, v in known.items() if own[k].shape == v.shape})
            if own["head.weight"].shape == known["head.weight"].shape and not linear:
                own["head.weight"] = known["head.weight"]
            module.load_state_dict(own)
            module.trunk.requires_grad_(not frozen)
        data = batch(size, outputs, kind, seed=number)
        order = (
            [[list(range(size))]] * steps
            if batches is None
            else oracles.cut_batches(size, batches, epochs=steps, seed=number)[:steps]
        )
        run = oracles.record_run(
            module,
            oracles.loss_of(KINDS[kind]),
            data,
            lambda m, make=optimizer: make(Trained(m)),
            order,
            checkpoints(steps),
        )
        stages.append(TrainedStage(run, module, KINDS[kind], data))
        tasks.append(CaseTask(kind))
    size, outputs, kind, _ = plan[-1]
    return Problem(stages, tasks, batch(3, outputs, kind, seed=9))


class Trained:
    """Only what an optimizer should hold."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def parameters(self):
        return [p for p in self.module.parameters() if p.requires_grad]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["sgd", "decay", "momentum", "dampening", "nesterov"])
def test_recorded_order_is_exact_unrolling_where_curvature_is_constant(name, frozen) -> None:
    """Least squares by full batches, a checkpoint after every step, both branches linear: the
    frozen trunk of stage 2 and the head of stage 1 couple, and nothing is approximated."""
    work = problem(
        ((10, 2, "regression", 8), (6, 1, "regression", 6)),
        (OPTIMIZERS[name], OPTIMIZERS[name]),
        frozen,
        linear=True,
        checkpoints=range,
    )
    truth = work.unrolled()
    scores = work.scores(Source(2, curvature="exact", order="recorded"))
    assert truth[:, :10].abs().max() > 1e-3
    assert relative(scores.values, truth) < 1e-9
    assert abs(slope(scores.values, truth) - 1) < 1e-9


def test_the_average_order_approaches_unrolling_with_the_rate() -> None:
    """At the same training time, the error of constant gradients and exp goes down with eta."""
    errors = []
    for finer in (1, 2):
        optimizer = lambda m, rate=0.05 / finer: torch.optim.SGD(m.parameters(), rate)  # noqa: E731
        plan = tuple((n, o, "regression", 8 * finer) for n, o in ((10, 2), (6, 1)))
        work = problem(plan, (optimizer, optimizer), linear=True, checkpoints=range)
        truth = work.unrolled()
        steps = list(range(1, 8 * finer))
        found = work.scores(Source(segment_steps=[steps, steps], curvature="exact")).values
        errors.append(relative(found, truth))
    assert errors[0] < 0.2
    assert 0.4 < errors[1] / errors[0] < 0.6


def test_dropping_coupling_or_own_sizes_is_seen(monkeypatch) -> None:
    """What the exact test above would miss if it could: both mistakes are far from the truth."""
    work = problem(
        ((10, 2, "regression", 8), (6, 1, "regression", 6)), linear=True, checkpoints=range
    )
    truth = work.unrolled()
    estimator = Source(2, curvature="exact", order="recorded")
    common = torch.cat([truth[:, :10] * 10 / 16, truth[:, 10:] * 6 / 16], 1)
    assert relative(common, truth) > 0.3
    assert relative(work.scores(estimator).values, truth) < 1e-9
    plain = FittedSegment.__init__

    def without(self, *arguments, **options) -> None:
        plain(self, *arguments, **{**options, "couples": False})

    monkeypatch.setattr(FittedSegment, "__init__", without)
    alone = work.scores(estimator).values
    assert relative(alone[:, :10], truth[:, :10]) > 0.3
    torch.testing.assert_close(alone[:, 10:], truth[:, 10:])


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["sgd", "momentum", "dampening", "nesterov", "adam", "adamw"])
def test_source_over_two_stages(name, frozen) -> None:
    """A tanh network, a new head, another loss, another N, mini-batches: the dense formula."""
    work = problem(optimizers=(OPTIMIZERS[name], OPTIMIZERS[name]), frozen=frozen, batches=4)
    last = work.stages[-1]
    cut = source_stages(work.stages, lambda run: run.segments(2), last.loss, work.queries)
    scores = work.scores(Source(2, curvature="exact"))
    assert scores.by_segment.shape == (4, 3, 16)
    expected = torch.zeros_like(scores.by_segment)
    expected[:2, :, :10], expected[2:, :, 10:] = cut
    assert relative(scores.by_segment, expected) < 1e-9
    assert relative(scores.values, expected.sum(0)) < 1e-9
    if frozen:
        alone = source_stages(
            work.stages, lambda run: run.segments(2), last.loss, work.queries, coupled=False
        )
        assert relative(alone[0], cut[0]) > 0.05


def test_three_stages_and_a_head_that_ends() -> None:
    """Stage 1's head ends there, stage 2's is frozen in none; the trunk is frozen in stage 3."""
    work = problem(
        (*DIFFERENT, (5, 2, "regression", 4)), (MOMENTUM, OPTIMIZERS["adamw"], SGD), frozen=False
    )
    last = work.stages[-1]
    assert frozen_names(work.stages, 2) == []
    cut = source_stages(work.stages, lambda run: run.segments(1), last.loss, work.queries)
    scores = work.scores(Source(1, curvature="exact"))
    assert relative(scores.values, torch.cat([part.sum(0) for part in cut], 1)) < 1e-9
    # Heads of stages 1 and 3 have one shape, but stage 2 knows only its own.
    rows = scores.provenance["stages"]
    assert [row["columns"] for row in rows] == [[0, 10], [10, 16], [16, 21]]
    assert [row["steps"] for row in rows] == [[0, 8], [8, 14], [14, 18]]
    assert scores.provenance["segments"] == [[0, 8], [8, 14], [14, 18]]


def split(run: Trajectory, step: int) -> tuple[Trajectory, Trajectory]:
    """One run cut in two, each like a run of its own."""
    steps, batches = run.steps, int(run.steps.batch_offsets[step])
    examples = int(steps.example_offsets[batches])
    columns = ("epoch", "learning_rate", "loss", "gradient_norm", "accumulation")

    def part(rows: slice, offsets, inner, used) -> dict:
        own = {name: getattr(steps, name)[rows] for name in columns}
        hyper = {name: values[rows] for name, values in steps.hyperparameters.items()}
        return {
            **own,
            "hyperparameters": hyper,
            "batch_offsets": offsets,
            "example_offsets": inner,
            "examples": used,
        }

    first = part(
        slice(0, step),
        steps.batch_offsets[: step + 1],
        steps.example_offsets[: batches + 1],
        steps.examples[:examples],
    )
    second = part(
        slice(step, None),
        steps.batch_offsets[step:] - batches,
        steps.example_offsets[batches:] - examples,
        steps.examples[examples:],
    )
    kept = run.checkpoints
    early = {s: c for s, c in kept.items() if s <= step}
    late = {s - step: dataclasses.replace(c, step=s - step) for s, c in kept.items() if s >= step}
    return (
        Trajectory(run.facts, dataclasses.replace(steps, **first), early),
        Trajectory(
            run.facts,
            dataclasses.replace(steps, **second),
            late,
            steps_before=dict.fromkeys(run.facts.parameters, step),
        ),
    )


class Staged(Trajectory):
    """A run that knows its stages, as one with a change of trained parameters does."""

    parts: tuple[Trajectory, ...] = ()

    def stages(self) -> tuple[Trajectory, ...]:
        return self.parts


def staged(run: Trajectory, parts: tuple[Trajectory, ...]) -> Staged:
    found = Staged(run.facts, run.steps, run.checkpoints)
    object.__setattr__(found, "parts", parts)
    return found


CUTTING = {
    "exact": (SGD, Source(segment_steps=[3], curvature="exact")),
    "ekfac": (SGD, Source(segment_steps=[3])),
    "leading": (SGD, Source(segment_steps=[3], leading_directions=5)),
    "adam": (OPTIMIZERS["adamw"], Source(segment_steps=[3], curvature="kfac")),
    "recorded": (MOMENTUM, Source(segment_steps=[3], order="recorded")),
    "recursion": (MOMENTUM, Source(segment_steps=[3], momentum="recursion")),
    "tracin": (MOMENTUM, TracIn()),
}


@pytest.mark.parametrize("name", quick(CUTTING, ["leading", "adam", "recorded", "tracin"]))
def test_a_run_cut_into_stages_is_the_same_run(name) -> None:
    """The same data, loss and parameters before and after a cut between epochs: nothing may change.
    (In mid-epoch each part would count what it drew itself.)"""
    optimizer, estimator = CUTTING[name]
    run, module, data = train(MLP, optimizer, checkpoints=(2, 3, 4, 5, 6))
    queries = TensorDataset(*MLP.batch(3, seed=7))

    def scores(trajectory, own) -> Scores:
        attribution = AttributionModule(module, trajectory, own, CaseTask(MLP.kind))
        return attribution.attribute(TensorDataset(*data), queries, 4, quiet())

    whole = scores(run, estimator)
    parts = split(run, 3)
    # Draws of labels differ with the step's number.
    sampled = name in ("ekfac", "leading", "adam", "recorded", "recursion")
    tolerance = 0.3 if sampled else 1e-9
    one = scores(staged(run, parts), estimator)
    assert one.values.shape == (3, 10)
    assert relative(one.by_segment, whole.by_segment) < tolerance
    assert one.provenance["segments"] == whole.provenance["segments"]
    assert one.self_influence is None
    if name == "tracin":
        two = scores(list(parts), estimator)
    elif name in ("recorded", "recursion"):
        return  # as two runs, the second begins with an empty buffer
    else:
        two = scores(list(parts), dataclasses.replace(estimator, segment_steps=[[], []]))
    assert two.values.shape == (3, 20)
    torch.testing.assert_close(two.values[:, :10] + two.values[:, 10:], one.values)


def test_momentum_goes_on_within_one_run() -> None:
    """With exact curvature no label is drawn, so the cut run is the whole run to rounding."""
    run, module, data = train(MLP, MOMENTUM, checkpoints=(2, 3, 4, 5, 6))
    queries = TensorDataset(*MLP.batch(3, seed=7))
    for options in ({"order": "recorded"}, {"momentum": "recursion"}):
        estimator = Source(segment_steps=[3], curvature="exact", **options)
        found = [
            AttributionModule(module, one, estimator, CaseTask(MLP.kind))
            .attribute(TensorDataset(*data), queries, 4, quiet())
            .by_segment
            for one in (run, staged(run, split(run, 3)))
        ]
        assert relative(found[1], found[0]) < 1e-9


def test_freezing_within_one_run_is_one_training_set() -> None:
    """Both stages use the same examples: one column each, the exact sum of what both did."""
    work = problem(
        ((8, 2, "regression", 6), (8, 2, "regression", 6)), linear=True, checkpoints=range
    )
    first, second = work.stages
    work.stages[1] = second = dataclasses.replace(
        second,
        data=first.data,
        trajectory=oracles.record_run(
            second.module,
            second.loss,
            first.data,
            lambda m: SGD(Trained(m)),
            [[list(range(8))]] * 6,
            range(6),
        ),
    )
    truth = work.unrolled()
    estimator = Source(2, curvature="exact", order="recorded")
    whole = staged(first.trajectory, (first.trajectory, second.trajectory))
    attribution = AttributionModule(first.module, whole, estimator, work.tasks[0])
    found = attribution.attribute(
        TensorDataset(*first.data), TensorDataset(*work.queries), 4, quiet()
    )
    assert found.values.shape == (3, 8)
    # Two segments in all, cut where the stage begins.
    assert found.provenance["segments"] == [[0, 6], [6, 12]]
    assert relative(found.by_segment[0], truth[:, :8]) < 1e-9
    assert relative(found.values, truth[:, :8] + truth[:, 8:]) < 1e-9
    assert [row["columns"] for row in found.provenance["stages"]] == [[0, 8], [0, 8]]
    assert torch.equal(found.stage(0).values, found.by_segment[0])


def test_an_influence_function_takes_a_staged_run_as_a_whole() -> None:
    run, module, data = train(MLP, SGD, checkpoints=(2, 4, 6))
    queries = TensorDataset(*MLP.batch(3, seed=7))
    found = [
        AttributionModule(module, one, InfluenceFunction("exact"), CaseTask(MLP.kind))
        .attribute(TensorDataset(*data), queries, 4, quiet())
        .values
        for one in (run, staged(run, split(run, 4)))
    ]
    assert torch.equal(*found)


def test_frozen_trunk_by_sampled_curvature_is_near_the_exact_one() -> None:
    """Blocks of EK-FAC with the coupling sampled, the same network at many draws of labels."""
    work = problem(batches=4)
    exact = work.scores(Source(2, curvature="exact", order="recorded")).values[:, :10]
    draws = [
        work.scores(Source(2, order="recorded", leading_directions=30, seed=100 * seed)).values
        for seed in range(4)
    ]
    mean = torch.stack(draws).mean(0)[:, :10]
    assert relative(mean, exact) < 0.2


def test_one_stage_alone_is_what_it_was() -> None:
    """The last stage's columns do not know that another came before."""
    work = problem(batches=4)
    last = work.stages[-1]
    alone = AttributionModule(last.module, last.trajectory, Source(2), work.tasks[-1])
    own = alone.attribute(TensorDataset(*last.data), TensorDataset(*work.queries), 4, quiet())
    both = work.scores(Source(2))
    torch.testing.assert_close(both.stage(1).values, own.values)
    assert "stages" not in own.provenance
    assert both.stage(1).provenance["segments"] == [[8, 11], [11, 14]]
    assert both.stage(0).values.shape == (3, 10)
    assert torch.equal(both.stage(0).values, both.values[:, :10])
    rows = both.provenance["stages"]
    assert rows[1]["frozen_parameters"] == ["trunk.weight", "trunk.bias"]
    assert [row["num_train"] for row in rows] == [10, 6]
    assert both.provenance["num_train"] == 16
    assert any("No self-influence" in note for note in both.provenance["notes"])
    with pytest.raises(IndexError, match="know 2 stages"):
        both.stage(2)
    with pytest.raises(IndexError, match="know 0 stages"):
        own.stage(0)


def test_scores_of_stages_stream_to_a_file(tmp_path) -> None:
    work = problem(batches=4)
    path = tmp_path / "scores.h5"
    found = work.scores(Source(2), scores_path=str(path))
    again = work.scores(Source(2))
    assert torch.equal(Scores.load(path).by_segment, again.by_segment)
    assert torch.equal(found.values, again.values)


def test_weights_of_all_modules_are_put_back() -> None:
    work = problem(batches=4)
    before = [copy.deepcopy(stage.module.state_dict()) for stage in work.stages]
    work.scores(Source(2))
    for stage, state in zip(work.stages, before, strict=True):
        for name, value in stage.module.state_dict().items():
            assert torch.equal(value, state[name])


def test_stages_that_do_not_follow_one_another_are_refused() -> None:
    work = problem(SAME_LOSS, frozen=False)
    first, second = work.stages
    parts = ([first.module, second.module], [first.trajectory, second.trajectory])
    second.trajectory.checkpoints[0].parameters["head.weight"][0, 0] += 0.25
    with pytest.raises(TrajectoryMismatchError, match=r"head.weight differs.*by up to 0.25"):
        AttributionModule(*parts, Source(1))
    # A head that was initialised anew under its old name and shape.
    AttributionModule(*parts, Source(1), fresh=["head"])
    with pytest.raises(TrajectoryMismatchError, match="shares no parameter"):
        AttributionModule(*parts, Source(1), fresh=["head", "trunk"])
    with pytest.raises(ValueError, match="one for each of the 2 trajectories, got 1"):
        AttributionModule([first.module], parts[1], Source(1))
    with pytest.raises(ValueError, match="empty list"):
        AttributionModule(first.module, [], Source(1))
    with pytest.raises(TrajectoryNotFoundError, match="no_such_run"):
        AttributionModule(first.module, Path("no_such_run"), Source(1))
    with pytest.raises(ValueError, match="task must be one"):
        AttributionModule(*parts, Source(1), [CaseTask("regression")] * 3)


def test_what_cannot_follow_stages_says_so() -> None:
    work = problem()
    with pytest.raises(UnsupportedTrainingError, match="Use Source"):
        work.scores(InfluenceFunction())
    with pytest.raises(ValueError, match="Use Source"):
        work.scores(TracIn())
    with pytest.raises(ValueError, match="one list of steps for each of the 2"):
        work.scores(Source(segment_steps=[2]))
    stages = [stage.trajectory for stage in work.stages]
    module = AttributionModule([s.module for s in work.stages], stages, Source(1), work.tasks)
    with pytest.raises(ValueError, match="train must be one data set, or a list"):
        module.attribute([TensorDataset(*work.stages[0].data)], TensorDataset(*work.queries))


def test_a_trunk_without_gradients_is_refused() -> None:
    """Under no_grad() the first stage would silently get scores of zero."""

    class Detached(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.trunk(inputs).tanh()
            return self.head(features)

    work = problem()
    last = work.stages[-1]
    detached = Detached(3, 1)
    work.stages[-1] = dataclasses.replace(last, module=detached)
    with pytest.raises(EngineError, match="does not depend on any frozen parameter"):
        work.scores(Source(1))

    class Half(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                shift = self.trunk.bias * 1.0
            return self.head((inputs @ self.trunk.weight.T + shift).tanh())

    work.stages[-1] = dataclasses.replace(last, module=Half(3, 1))
    notes = work.scores(Source(1)).provenance["notes"]
    assert any("frozen parameters trunk.bias as far as autograd" in note for note in notes)


def test_one_module_and_task_serve_all_stages() -> None:
    """One module is loaded with the weights of whichever stage is at work."""
    work = problem(SAME_LOSS, (MOMENTUM, SGD), frozen=False, batches=4)
    expected = work.scores(Source(2, curvature="exact", order="recorded"))
    attribution = AttributionModule(
        work.stages[0].module,
        [stage.trajectory for stage in work.stages],
        Source(2, curvature="exact", order="recorded"),
        work.tasks[0],
    )
    found = attribution.attribute(
        [TensorDataset(*stage.data) for stage in work.stages],
        TensorDataset(*work.queries),
        4,
        quiet(),
    )
    torch.testing.assert_close(found.by_segment, expected.by_segment)


SHARDED = {
    "average": Source(2, curvature="exact"),
    "recorded": Source(2, curvature="exact", order="recorded"),
}


def score_stages(rank: int) -> dict[str, Tensor]:
    work, found = problem(batches=4), {}
    for name, estimator in SHARDED.items():
        for stage in work.stages:
            stage.trajectory.curvature.clear()
        found[name] = work.scores(estimator, quiet(devices=2, strategy="ddp")).by_segment
    return found


def test_two_processes() -> None:
    """The frozen parameters' adjoint is a sum over both."""
    work, both = problem(batches=4), results(score_stages)
    for name, estimator in SHARDED.items():
        expected = work.scores(estimator).by_segment
        for found in both:
            torch.testing.assert_close(found[name], expected)


def test_runs_one_after_another_at_other_weights() -> None:
    """Each what-if run begins where that of the stage before ended."""
    staged = problem()
    scores = staged.scores(Source(2, curvature="exact"), keep=0.5)
    first, second = (next(iter(s.trajectory.what_if.values())) for s in staged.stages)
    for name in ("trunk.weight", "trunk.bias"):
        start, end = second.checkpoints[0], first.checkpoints[first.last_step]
        assert torch.equal(start.buffers[name], end.parameters[name])
    made = [
        dataclasses.replace(stage, trajectory=run)
        for stage, run in zip(staged.stages, (first, second), strict=True)
    ]
    alone = dataclasses.replace(staged, stages=made).scores(Source(2, curvature="exact"))
    assert relative(scores.values, alone.values) < 1e-12
    assert scores.provenance["what_if"]["runs"] == ["in memory"] * 2
