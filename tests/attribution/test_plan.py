"""What is planned is what then happens, and planning changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.attribution.dry_run_substitutes import Decompositions
from tda_lightning.cli.plan_tables import recording_plan_table
from tda_lightning.curvature.orthonormal import orthonormal
from tda_lightning.estimators import (
    TRAK,
    InfluenceFunction,
    MultiStageInfluence,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.estimators.unrolled import resume
from tda_lightning.examples.models.gpt import GPT
from tda_lightning.recording.plan import (
    JUMPS,
    PARAMETERS,
    STATE,
    STATISTICS,
    STEPS,
    SUMS,
)
from tda_lightning.records.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tda_lightning.records.plans import RecordingPlan
from tda_lightning.records.provenance import Provenance
from tda_lightning.runtime import clock
from tda_lightning.runtime.memory import PeakMemory
from tda_lightning.session.pace import Pace
from tda_lightning.session.session import Session
from tda_lightning.solvers import ConjugateGradients
from tda_lightning.store import layout
from tests import oracles, runs
from tests.attributing import CaseTask, quiet
from tests.cases.training import CLASSIFIER, OPTIMIZERS, queries_of, train
from tests.estimators.test_stages import SAME_LOSS, problem
from tests.quick import quick
from tests.recording import test_online_curvature as online

# Recording


def shown(plan: Any) -> str:
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(recording_plan_table(plan))
    return console.export_text()


class Wide(runs.Net):
    """A few megabytes; one matrix is a little larger than a chunk of the store."""

    def __init__(self, optimizers: Any) -> None:
        super().__init__(optimizers)
        self.net = nn.Sequential(
            nn.Linear(3, 1000), nn.BatchNorm1d(1000), nn.Linear(1000, 1100), nn.Linear(1100, 1)
        )


STATES = {
    "plain": (lambda m: torch.optim.SGD(m.parameters(), 1e-4), 0),
    "momentum": (lambda m: torch.optim.SGD(m.parameters(), 1e-4, momentum=0.9), 1),
    "adamw": (lambda m: torch.optim.AdamW(m.parameters(), 1e-4), 2),
}


@pytest.mark.parametrize("name", STATES)
def test_a_checkpoint_takes_what_is_planned(name: str, tmp_path: Path) -> None:
    optimizers, copies = STATES[name]
    recorder = TrajectoryRecorder(tmp_path, num_checkpoints=2)
    module = Wide(optimizers)
    plan = recorder.plan(module, runs.trainer(max_epochs=1), runs.loader())
    runs.fit(tmp_path, module=module, recorder={"num_checkpoints": 2}, max_epochs=1)
    parameters = 4 * sum(p.numel() for p in module.parameters())
    first, *others = layout.checkpoint_files(tmp_path).values()
    assert first.stat().st_size == pytest.approx(parameters, rel=0.02)
    assert len(others) == 2
    for file in others:
        assert file.stat().st_size == pytest.approx((1 + copies) * parameters, rel=0.02)
        assert file.stat().st_size == pytest.approx(plan.checkpoint_bytes, rel=0.005)
    written = sum(file.stat().st_size for file in layout.checkpoint_files(tmp_path).values())
    assert written == pytest.approx(plan.disk_bytes, rel=0.02)
    by_name = {item.name: item for item in plan.disk}
    assert by_name[PARAMETERS].bytes == parameters
    tensors = len(list(module.parameters()))
    assert by_name[STATE].bytes == copies * parameters + 4 * tensors * (name == "adamw")


def test_a_small_checkpoint_is_mostly_structure(tmp_path: Path) -> None:
    """Within a fifth: the states of the generators and HDF5's records outweigh 200 bytes."""
    plan = TrajectoryRecorder(tmp_path).plan(runs.Net(), runs.trainer(), runs.loader())
    runs.fit(tmp_path)
    *_, last = layout.checkpoint_files(tmp_path).values()
    assert last.stat().st_size == pytest.approx(plan.checkpoint_bytes, rel=0.2)


class EveryPrime(TrajectoryRecorder):
    def should_record(self, step: int) -> bool:
        return step in (2, 3, 5, 7, 11)


# 22 examples in batches of 4 are 6 batches an epoch.
SCHEDULES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"num_checkpoints": 50}, {}),
    ({"every_n_steps": 5}, {}),
    ({"every_n_steps": 4, "save_optimizer": 2}, {"max_epochs": 3}),
    ({"every_n_epochs": 2, "save_optimizer": False}, {"max_epochs": 3}),
    ({"num_checkpoints": 3, "save_optimizer": 2}, {"accumulate_grad_batches": 4}),
    ({"num_checkpoints": 2}, {"limit_train_batches": 5, "accumulate_grad_batches": 2}),
    ({"num_checkpoints": 2}, {"limit_train_batches": 0.5}),
    ({"num_checkpoints": 3}, {"max_epochs": -1, "max_steps": 7}),
    ({"num_checkpoints": 3}, {"max_epochs": 2, "max_steps": 9}),
    ({"num_checkpoints": 3}, {"max_epochs": None, "max_steps": 8}),
]


@pytest.mark.parametrize(("options", "limits"), SCHEDULES)
def test_steps_and_checkpoints_are_counted(
    options: dict[str, Any], limits: dict[str, Any], tmp_path: Path
) -> None:
    recorder = TrajectoryRecorder(tmp_path, **options)
    plan = recorder.plan(runs.Net(), runs.trainer(**limits), runs.loader())
    runs.fit(tmp_path, recorder=options, **limits)
    require_as_recorded(plan, tmp_path)


def test_a_schedule_of_ones_own_is_counted(tmp_path: Path) -> None:
    recorder = EveryPrime(tmp_path)
    plan = recorder.plan(runs.Net(), runs.trainer(), runs.loader())
    runs.trainer(recorder).fit(runs.Net(), runs.loader())
    require_as_recorded(plan, tmp_path)


def require_as_recorded(plan: RecordingPlan, path: Path) -> None:
    run = Trajectory.load(str(path))
    assert plan.steps == run.num_steps
    assert plan.checkpoints == len(run.checkpoints)
    with_state = sum(any((kept.optimizer or {}).values()) for kept in run.checkpoints.values())
    planned = {item.name: item for item in plan.disk}
    assert (planned[STATE].count if STATE in planned else 0) == with_state
    steps = run.steps
    tables = [value for value in vars(steps).values() if isinstance(value, Tensor)]
    size = sum(t.numel() * t.element_size() for t in [*tables, *steps.hyperparameters.values()])
    # The offsets have one entry more than there are rows; a last batch may be short.
    assert size - 16 <= planned[STEPS].total <= 1.5 * size
    assert planned[JUMPS].count == len(steps.random)
    states = steps.random[0].values()
    assert planned[JUMPS].bytes == pytest.approx(
        sum(s.numel() * s.element_size() for s in states), rel=0.01
    )


def scheduled(module: Any) -> Any:
    """Asks for the number of steps, draws, freezes and notes: all that a plan must not leave."""
    module.drawn = torch.rand(1)
    module.net[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), 0.05, 0.9)
    total = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Data(LightningDataModule):
    """Splits with the global generator, once."""

    def __init__(self) -> None:
        super().__init__()
        self.part: Any = None

    def setup(self, stage: str) -> None:
        if self.part is None:
            self.part = torch.utils.data.random_split(runs.Numbered(), [16, 6])[0]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.part, 4, shuffle=True)


def test_training_after_a_plan_is_the_training_without(tmp_path: Path) -> None:
    def trained(planned: bool) -> tuple[Any, Tensor]:
        torch.manual_seed(3)
        module, data, trainer = runs.Net(scheduled), Data(), runs.trainer()
        if planned:
            before = dict(vars(module))
            plan = TrajectoryRecorder(tmp_path).plan(module, trainer, data)
            assert plan.steps == 8
            assert vars(module) == before
            assert all(p.requires_grad and p.grad is None for p in module.parameters())
        trainer.fit(module, data)
        return module, torch.rand(3)

    (plain, drawn), (planned, drawn_too) = trained(False), trained(True)
    assert plain.seen == planned.seen
    assert plain.losses == planned.losses
    assert torch.equal(drawn, drawn_too)
    for one, other in zip(plain.parameters(), planned.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not list(tmp_path.iterdir())


class LastToken(nn.Module):
    """A few megabytes with a head beyond ``dense_side``, and one of the tied kind."""

    def __init__(self, vocabulary: int = 4500, tied: bool = False) -> None:
        super().__init__()
        self.gpt = GPT(vocabulary, 16, width=96, depth=2, tied=tied)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens)[:, -1, :3]


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 600), nn.Tanh(), nn.Linear(600, 500), nn.Tanh(), nn.Linear(500, 3)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1152, 3),
    )


GATHERED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "MLP": (perceptron, online.vectors, {}),
    "MLP with a frozen bias": (lambda: frozen(perceptron()), online.vectors, {}),
    "MLP in float64": (perceptron, online.vectors, {"curvature_dtype": "float64"}),
    "MLP with wide sides": (perceptron, online.vectors, {"curvature_dense_side": 0}),
    "CNN": (convolutions, online.pictures, {}),
    "GPT": (LastToken, online.tokens, {}),
    "tied GPT": (lambda: LastToken(700, tied=True), online.tokens, {}),
}


def frozen(network: nn.Module) -> nn.Module:
    network[0].bias.requires_grad_(False)
    network[2].weight.requires_grad_(False)
    return network


@pytest.mark.parametrize("case", GATHERED)
def test_statistics_take_what_is_planned(case: str, tmp_path: Path) -> None:
    make, inputs, settings = GATHERED[case]
    options = {"every_n_steps": 3, "curvature": "online", "curvature_every": 2, **settings}
    module = online.Model(make())
    data = DataLoader(online.data(inputs), 8)
    trainer = runs.trainer(max_epochs=2)
    plan = TrajectoryRecorder(tmp_path, **options).plan(module, trainer, data)
    online.run(tmp_path, lambda: online.Model(make()), online.data(inputs), options)
    files = layout.statistics_files(tmp_path)
    by_name = {item.name: item for item in (*plan.disk, *plan.memory)}
    assert by_name[STATISTICS].count == len(files) == plan.checkpoints - 1 == 4
    for file in files.values():
        assert file.stat().st_size > 1e6
        assert file.stat().st_size == pytest.approx(by_name[STATISTICS].bytes, rel=0.02)
    blocks = Trajectory.load(str(tmp_path)).statistics[0, 3].values()
    sums = [getattr(block, kind) for block in blocks for kind in block.SUMS]
    # In the end there are as many numbers as were told, exactly.
    assert by_name[SUMS].bytes == sum(s.numel() * s.element_size() for s in sums)
    text = shown(plan).replace("\n", " ")
    assert "told from the kinds of modules" in text
    assert "not counted" not in text
    written = sum(file.stat().st_size for file in tmp_path.rglob("*.h5"))
    assert written == pytest.approx(plan.disk_bytes, rel=0.03)


def test_statistics_of_small_layers_are_mostly_structure(tmp_path: Path) -> None:
    """Every kind of layer: the numbers are told exactly, the file within a tenth."""
    for name, (make, inputs) in online.NETWORKS.items():
        path = tmp_path / name
        module = online.Model(make())
        recorder = TrajectoryRecorder(path, curvature="online", curvature_every=1)
        plan = recorder.plan(module, runs.trainer(max_epochs=2), DataLoader(online.data(inputs), 8))
        online.run(path, lambda: online.Model(make()), online.data(inputs))  # noqa: B023
        planned = {item.name: item for item in (*plan.disk, *plan.memory)}
        *_, last = layout.statistics_files(path).values()
        assert last.stat().st_size == pytest.approx(planned[STATISTICS].bytes, rel=0.1), name
        if name == "tied":  # by its weight, not by its module: told in the notes
            continue
        blocks = Trajectory.load(str(path)).merged_statistics(0, 10).values()
        sums = [getattr(block, kind) for block in blocks for kind in block.SUMS]
        assert planned[SUMS].bytes == 4 * sum(s.numel() for s in sums), name


def test_intervals_without_a_watched_step_are_not_counted(tmp_path: Path) -> None:
    options = {"every_n_steps": 2, "curvature": "online", "curvature_every": 5}
    recorder = TrajectoryRecorder(tmp_path, **options)
    plan = recorder.plan(runs.Net(), runs.trainer(), runs.loader())
    runs.fit(tmp_path, recorder=options)
    found = Trajectory.load(str(tmp_path)).statistics
    gathered = [interval for interval in found if found[interval]]
    assert gathered == [(4, 6), (8, 10)]
    assert {item.name: item.count for item in plan.disk}[STATISTICS] == len(gathered)
    without = TrajectoryRecorder(tmp_path).plan(runs.Net(), runs.trainer(), runs.loader())
    assert STATISTICS not in {item.name for item in without.disk}
    assert SUMS not in {item.name for item in without.memory}
    assert "urvature" not in shown(without)


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(tmp_path)
    plan = recorder.plan(runs.Net(), runs.trainer())
    assert (plan.steps, plan.checkpoints, plan.disk_bytes) == (None, None, None)
    assert plan.checkpoint_bytes > 20_000
    text = shown(plan)
    assert "pass the loader or the data module as train=" in text
    assert "at most 7 checkpoints" in text
    plan = recorder.plan(runs.Net(), runs.trainer(), runs.loader(runs.Stream()))
    assert plan.steps is None
    assert "The loader has no length" in shown(plan)
    plan = recorder.plan(runs.Net(), runs.trainer(max_steps=5), runs.loader(runs.Stream()))
    assert (plan.steps, plan.checkpoints) == (5, 6)


def test_an_optimizer_that_cannot_be_made_yet(tmp_path: Path) -> None:
    def needs_data(module: Any) -> Any:
        raise RuntimeError("where are the data")

    recorder = TrajectoryRecorder(tmp_path)
    plan = recorder.plan(runs.Net(needs_data), runs.trainer(), runs.loader())
    assert plan.disk_bytes is None
    assert "where are the data" in shown(plan)

    def two(module: Any) -> Any:
        return [torch.optim.SGD(module.parameters(), 0.1) for _ in range(2)]

    with pytest.raises(UnsupportedTrainingError, match="got 2 optimizers"):
        recorder.plan(runs.Net(two), runs.trainer(), runs.loader())


# Attribution


@pytest.fixture(scope="module")
def work() -> Any:
    run, module, data = train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(3, 6, 9))
    return run, module, TensorDataset(*data), TensorDataset(*queries_of(CLASSIFIER))


def adam_work() -> Any:
    run, module, data = train(CLASSIFIER, OPTIMIZERS["adamw"], checkpoints=(3, 6, 9))
    return run, module, TensorDataset(*data), TensorDataset(*queries_of(CLASSIFIER))


@contextmanager
def counted() -> Iterator[list[int]]:
    """The batches or steps of every walk and loop that is gone through meanwhile."""
    sizes: list[int] = []
    walk, loop = Pace.walk, Pace.loop

    def counted_walk(self: Pace, *arguments: Any) -> Any:
        sizes.append(len(arguments[-1]))
        return walk(self, *arguments)

    def counted_loop(self: Pace, title: str, items: Any, total: int | None, memory: int) -> Any:
        items = list(items)
        sizes.append(len(items))
        return loop(self, title, items, total, memory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "walk", counted_walk)
        patch.setattr(Pace, "loop", counted_loop)
        yield sizes


ESTIMATORS = {
    "source": Source(),
    "source, blocks": Source(leading_directions=8),
    "source, recursion": Source(momentum="recursion"),
    "source, exact": Source(curvature="exact"),
    "recorded": Source(order="recorded"),
    "tracin": TracIn(),
    "influence": InfluenceFunction(),
    "undamped": InfluenceFunction(curvature="exact", damping=0.0),
    "influence, cg": InfluenceFunction(solver=ConjugateGradients("ekfac", iterations=2)),
    "trak": TRAK(projection_dimension=4),
    "unrolled": Unrolled(),
    "unrolled, rounds": Unrolled(memory_budget=1700),
    "unrolled, recomputed": Unrolled(states="recompute"),
    "unrolled, disk": Unrolled(states="disk", token_weights=True),
    "unrolled, last steps": Unrolled(last_steps=4),
}


PLANNED = [
    *((name, 3) for name in ESTIMATORS),
    ("recorded, adam", 3),
    ("source", 1),
    ("recorded", 1),
]
# What they walk over, another plan walks over as well.
ALIKE = ("source, exact", "source, recursion", "recorded", "influence", "unrolled")


@pytest.mark.parametrize(
    ("name", "rounds"), quick(PLANNED, [case for case in PLANNED if case[0] not in ALIKE])
)
def test_passes_batches_and_sizes_are_those_of_the_attribution(
    name: str, rounds: int, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, module, examples, queries = adam_work() if name == "recorded, adam" else work
    run = dataclasses.replace(run, curvature={})
    if rounds > 1:
        monkeypatch.setattr("tda_lightning.session.session.memory_budget", lambda: 1)
    estimator = ESTIMATORS.get(name, ESTIMATORS["recorded"])
    if name == "undamped":
        estimator = InfluenceFunction(curvature="exact", damping=1e-3)
        unchanged = AttributionModule(module, run, ESTIMATORS[name], CaseTask("classification"))
        assert unchanged.plan(examples, queries, 4, quiet()).seconds > 0
    attribution = AttributionModule(module, run, estimator, CaseTask("classification"))
    weights = [p.clone() for p in module.parameters()]
    torch.manual_seed(5)
    plan = attribution.plan(examples, queries, 4, quiet())
    drawn = torch.rand(2)
    assert not run.curvature
    for before, after in zip(weights, module.parameters(), strict=True):
        assert torch.equal(before, after)
    with counted() as sizes:
        scores = attribution.attribute(examples, queries, 4, quiet())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(2))
    assert plan.num_passes == len(sizes)
    assert plan.num_batches == sum(sizes)
    kept = [scores.values, scores.by_segment, scores.by_token]
    assert plan.scores_bytes == sum(t.numel() * t.element_size() for t in kept if t is not None)
    fitted = [tensor for one in run.curvature.values() for tensor in one.values()]
    assert plan.curvature_bytes == sum(t.numel() * t.element_size() for t in fitted)
    assert plan.seconds > 0
    assert all(one.seconds >= 0 for one in plan.passes)
    again = attribution.plan(examples, queries, 4, quiet())
    assert again.curvature_bytes == 0
    assert again.num_passes == plan.num_passes - _curvature_passes(plan)
    assert f"{plan.num_train} training examples for 3 queries" in str(plan)


STAGED = {
    "source": Source(1),
    "recorded": Source(1, order="recorded"),
    "multi-stage": MultiStageInfluence(),
    "tracin": TracIn(),
    "unrolled": Unrolled(),
    "unrolled, last steps": Unrolled(last_steps=7),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("source", "unrolled") else pytest.mark.slow)
        for name in STAGED
    ],
)
def test_several_stages_are_planned(name: str) -> None:
    """Passes, batches and sizes are those of the attribution, stage by stage."""
    stages = problem(SAME_LOSS, frozen=name != "tracin", batches=4).stages
    settings = {"eval_modules": [name for name, _ in stages[0].module.named_modules()]}
    runs = [
        dataclasses.replace(
            stage.trajectory, facts=dataclasses.replace(stage.trajectory.facts, settings=settings)
        )
        for stage in stages
    ]
    attribution = AttributionModule(
        [stage.module for stage in stages], runs, STAGED[name], CaseTask("regression")
    )
    data = [TensorDataset(*stage.data) for stage in stages]
    queries = TensorDataset(*(part[:3] for part in stages[0].data))
    plan = attribution.plan(data, queries, 4, quiet())
    assert not any(run.curvature or run.unfinished for run in runs)
    with counted() as sizes:
        scores = attribution.attribute(data, queries, 4, quiet())
    assert plan.num_train == 16
    assert (plan.num_passes, plan.num_batches) == (len(sizes), sum(sizes))
    kept = [scores.values, scores.by_segment]
    assert plan.scores_bytes == sum(t.numel() * t.element_size() for t in kept if t is not None)
    fitted = [tensor for run in runs for one in run.curvature.values() for tensor in one.values()]
    assert plan.curvature_bytes == sum(t.numel() * t.element_size() for t in fitted)
    assert {one.title.split(",")[0] for one in plan.passes} == {"stage 1", "stage 2"}
    if name == "unrolled":
        (trained, *_) = attribution.plan(data, queries, 4, quiet(), keep=0.5, draws=0).passes
        assert (trained.title[:11], trained.count, trained.batches) == ("what-if run", 1, 14)


def test_the_rounds_and_recomputations_of_exact_unrolling_are_planned(work: Any) -> None:
    run, module, examples, queries = work
    batches = oracles.cut_batches(10, 4, epochs=9)
    sparse, *_ = train(CLASSIFIER, OPTIMIZERS["momentum"], batches=batches)

    def titles(estimator: Unrolled, run: Trajectory = run) -> dict[str, tuple[int, int]]:
        attribution = AttributionModule(module, run, estimator, CaseTask("classification"))
        passes = attribution.plan(examples, queries, 4, quiet()).passes
        return {one.title: (one.count, one.batches) for one in passes}

    there, back, on = (f"steps # to #, {way}" for way in ("forwards", "backwards", "replayed"))
    assert titles(Unrolled()) == {there: (3, 9), back: (3, 9)}
    assert titles(Unrolled(last_steps=4)) == {there: (2, 4), back: (2, 4), on: (1, 2)}
    assert titles(Unrolled(memory_budget=1700)) == {there: (9, 27), back: (9, 27)}
    # The states of 27 steps are not kept at once: the walk to the end first leads to the cuts.
    cut = titles(Unrolled(states="recompute"), sparse)
    assert cut[there][1] == cut[back][1] == 27
    assert cut[there][0] == cut[back][0] > 1
    assert 0 < cut[on][1] < 27


def test_a_plan_of_an_interrupted_attribution_is_that_of_its_rest(
    work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, module, examples, queries = work
    run = dataclasses.replace(run, unfinished={})
    monkeypatch.setattr(resume, "_SECONDS", 0.0)
    attribution = AttributionModule(module, run, Unrolled(), CaseTask("classification"))
    assert attribution.plan(examples, queries, 4, quiet()).num_passes == 6
    assert not run.unfinished

    loop, started = Pace.loop, []

    def interrupted(self: Pace, title: str, *rest: Any) -> Any:
        started.append(title)
        if len(started) == 4:
            raise KeyboardInterrupt
        return loop(self, title, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "loop", interrupted)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            attribution.attribute(examples, queries, 4, quiet())
    ((key, kept),) = run.unfinished.items()
    assert attribution.plan(examples, queries, 4, quiet()).num_passes == 4
    assert list(run.unfinished) == [key]
    assert run.unfinished[key] is kept
    scores = attribution.attribute(examples, queries, 4, quiet())
    # The certificate is of the whole run, the part before the interruption included.
    assert scores.provenance["certificate"]["checkpoints"] == 3
    assert not run.unfinished


def test_what_a_dry_run_replays_is_refused_for_nothing(work: Any) -> None:
    run, module, examples, queries = work
    steps = dataclasses.replace(run.steps, loss=run.steps.loss + 1)
    run = dataclasses.replace(run, steps=steps)
    attribution = AttributionModule(module, run, Unrolled(), CaseTask("classification"))
    assert attribution.plan(examples, queries, 4, quiet()).num_passes == 6
    with pytest.raises(TrajectoryMismatchError, match="the replay is not the recorded run"):
        attribution.attribute(examples, queries, 4, quiet())


def _curvature_passes(plan: Any) -> int:
    words = ("covariances", "eigenvalues", "leading", "Gauss-Newton")
    return sum(one.count for one in plan.passes if any(word in one.title for word in words))


class Clock:
    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


@dataclasses.dataclass
class Timed:
    """Walks that take what a clock is told: 5 before each, an example 2, the first batch 3 more, 7
    after each."""

    clock: Clock
    order: list[list[int]] | None
    titles: list[str]

    def segment_count(self, session: Session) -> int | None:
        return None

    def score(self, session: Session) -> Provenance:
        for title in self.titles:
            self.clock.at += 5
            for number, batch in enumerate(session.walk(title, 3, self.order)):
                self.clock.at += 2 * len(batch.examples) + 3 * (number == 0)
            self.clock.at += 7
        return {"notes": []}


@pytest.mark.parametrize("size", [10, 20])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_walk_takes_its_examples_times_their_time(
    size: int, ordered: bool, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, module, _, queries = work
    examples = TensorDataset(*CLASSIFIER.batch(size, 0))
    run = dataclasses.replace(run, facts=dataclasses.replace(run.facts, num_examples=size))
    own = Clock()
    monkeypatch.setattr(clock, "now", own)
    order = [list(range(start, start + 5)) for start in reversed(range(0, size, 5))]
    titles = ["step 1", "step 2", "again", "again", "again", "again"]
    estimator = Timed(own, order if ordered else None, titles)
    attribution = AttributionModule(module, run, estimator, CaseTask("classification"))
    plan = attribution.plan(examples, queries, 4, quiet())
    assert plan.preparation == pytest.approx(6 * (5 + 7))
    assert [group.count for group in plan.passes] == [2, 4]
    assert [group.seconds for group in plan.passes] == pytest.approx([3 + 2 * size] * 2)
    before = own.at
    attribution.attribute(examples, queries, 4, quiet())
    assert own.at - before == pytest.approx(plan.seconds)


@dataclasses.dataclass
class ThereAndBack:
    """Loops over steps, last ones first, that take what a clock is told: a step 2 on the way there,
    3 on the way back, the first of all 11 more; 5 before each stretch."""

    clock: Clock
    stretches: list[range]
    steps: int = 0

    def segment_count(self, session: Session) -> int | None:
        return None

    def score(self, session: Session) -> Provenance:
        self.steps = 0
        for rows in self.stretches:
            title = f"steps {rows.start} to {rows.stop}"
            self.clock.at += 5
            states = []
            for row in session.loop(f"{title}, there", rows, memory=1 << 40):
                self.clock.at += 2 + 11 * (not self.steps)
                self.steps += 1
                states.append(row)
            for row in session.loop(f"{title}, back", states[::-1], total=len(rows)):
                self.clock.at += 3
                assert states.pop() == row
        return {"notes": []}


@pytest.mark.parametrize("length", [1, 2, 40])
def test_a_loop_takes_its_steps_times_their_time(
    length: int, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, module, examples, queries = work
    own = Clock()
    monkeypatch.setattr(clock, "now", own)
    stretches = [range(start, start + length) for start in (80, 40, 0)]
    estimator = ThereAndBack(own, stretches)
    attribution = AttributionModule(module, run, estimator, CaseTask("classification"))
    plan = attribution.plan(examples, queries, 4, quiet())
    assert plan.seconds == pytest.approx(3 * (5 + length * (2 + 3)) + 11)
    assert [(group.count, group.batches) for group in plan.passes] == [(3, 3 * length)] * 2
    assert estimator.steps <= 3 * 13
    if plan.peak_bytes is not None and length > 13:  # what was not visited would have been kept
        assert plan.peak_bytes > 1 << 39
    before = own.at
    attribution.attribute(examples, queries, 4, quiet())
    assert own.at - before == pytest.approx(plan.seconds)


@dataclasses.dataclass
class Rounds:
    """A round for every query: 5 before all, 2 for each, the first 3 more, a walk in each."""

    clock: Clock

    def segment_count(self, session: Session) -> int | None:
        return None

    def score(self, session: Session) -> Provenance:
        self.clock.at += 5
        for first, _ in session.query_rounds(1, budget=1):
            self.clock.at += 2 + 3 * (first == 0)
            for _ in session.walk("walk", 3):
                self.clock.at += 1
        return {"notes": []}


def test_later_rounds_of_queries_are_like_the_second(
    work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, module, examples, queries = work
    own = Clock()
    monkeypatch.setattr(clock, "now", own)
    attribution = AttributionModule(module, run, Rounds(own), CaseTask("classification"))
    many = ConcatDataset([queries] * 4)
    plan = attribution.plan(examples, many, 5, quiet())
    assert plan.preparation == pytest.approx(5 + 2 * len(many) + 3)
    assert [(group.count, group.batches) for group in plan.passes] == [(len(many), 2 * len(many))]
    before = own.at
    attribution.attribute(examples, many, 5, quiet())
    assert own.at - before == pytest.approx(plan.seconds)


def test_wide_eigenvectors_are_timed_small_and_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    own, called = Clock(), []
    true = torch.linalg.eigh

    def eigh(matrix: Tensor) -> Any:
        called.append(matrix.shape[-1])
        own.at += 1
        return true(matrix[:2, :2])

    monkeypatch.setattr(clock, "now", own)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with PeakMemory() as memory:
        stand_ins = Decompositions(memory)
        # The function mode sees torch's own function, not one that stands for it in a test.
        for width, groups, seconds in ((2048, 1, 8.0), (2048, 2, 16.0), (512, 3, 3.0)):
            before = stand_ins.owed
            like = torch.eye(width).expand(groups, width, width)
            values, vectors = stand_ins.__torch_function__(eigh, (), (like,))
            assert stand_ins.owed - before == pytest.approx(seconds - (width == 512 or groups == 1))
            assert values.shape == (groups, width)
            assert vectors.shape == (groups, width, width)
            assert vectors.is_contiguous()
    assert called == [1024, 512]


def test_decompositions_stand_in_for_torchs_own() -> None:
    tall = torch.randn(40_000, 8, generator=torch.Generator().manual_seed(0))
    with PeakMemory() as memory, Decompositions(memory) as stand_ins:
        q = torch.linalg.qr(tall).Q
        wide = torch.linalg.eigh(torch.eye(200)).eigenvectors
        small = torch.linalg.eigh(torch.diag(torch.tensor([2.0, 1.0]))).eigenvalues
        rows, lengths = orthonormal(tall.T)
        few, _ = orthonormal(tall[:100].T)
    assert q.shape == tall.shape
    assert rows.shape == (8, 40_000) and lengths.shape == (8,)
    torch.testing.assert_close(few @ few.T, torch.eye(8))  # done as it is
    assert wide.shape == (200, 200)
    assert small.tolist() == [1.0, 2.0]
    assert len(stand_ins._known) == 3


def test_peak_memory_is_of_the_work_inside() -> None:
    with PeakMemory() as memory:
        before = memory.bytes
        if before is None:
            pytest.skip("the system does not tell")
        torch.ones(25_000_000)
        assert 80e6 < memory.bytes - before < 130e6
        memory.also(1 << 40)
        assert memory.bytes > 1 << 40
