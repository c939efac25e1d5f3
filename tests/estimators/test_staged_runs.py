"""Recorded runs of several stages, attributed: freezing, thawing and further fits, against
unrolling through the recorded steps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Scores
from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tda_lightning.records.trajectory import StageFact, Trajectory
from tda_lightning.replay.what_if import subset_weights
from tda_lightning.report import write_report
from tda_lightning.store import open_trajectory
from tests import oracles
from tests.attributing import CaseTask, quiet, relative, watched_walks
from tests.oracles.runs_in_stages import unrolled_run
from tests.oracles.stages import TrainedStage, source_stages
from tests.quick import quick
from tests.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore")

TRUNK, HEAD = ("trunk.weight", "trunk.bias"), ("head.weight", "head.bias")
LOSS = oracles.loss_of(oracles.mean_squared_error)


def regression(size: int, seed: int, outputs: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(size, outputs, generator=generator, dtype=torch.float64)


DATA, QUERIES = regression(8, 1), regression(3, 2)


class Linear(LightningModule):
    """Two branches that are both linear: curvature is constant, and they couple."""

    def __init__(self, make: Callable[[Any], Any], filtered: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.make, self.filtered = make, filtered
        self.trunk, self.head = nn.Linear(3, 2), nn.Linear(3, 2)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.trunk(inputs) + self.head(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return self.make([p for p in self.parameters() if p.requires_grad or not self.filtered])


class Trains(Callback):
    """What each two epochs train, of "t" and "h"."""

    def __init__(self, plan: str) -> None:
        self.plan = plan.split()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        now = self.plan[trainer.current_epoch // 2]
        pl_module.trunk.requires_grad_("t" in now)
        pl_module.head.requires_grad_("h" in now)


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.trunk)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.trunk, optimizer, lr=0.03)


def sgd(**options: Any) -> Callable[[Any], Any]:
    return lambda parameters: torch.optim.SGD(parameters, 0.1, **options)


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, 0.05, weight_decay=0.1, eps=1e-4)


def record(
    path: Path, module: LightningModule, *callbacks: Any, fits: tuple[int, ...], **options: Any
) -> Trajectory:
    """Fits of so many times two steps, each of two accumulated batches: all examples."""
    recorder = TrajectoryRecorder(path, **{"every_n_steps": 1, **options})
    made = trainer(*callbacks, recorder, max_epochs=0, accumulate_grad_batches=2)
    for number in range(len(fits)):
        made.fit_loop.max_epochs = 2 * sum(fits[: number + 1])
        made.fit(module, DataLoader(TensorDataset(*DATA), 4))
    return open_trajectory(path)


def scores(
    trajectory: Any, module: nn.Module, estimator: Any, data: Any = DATA, **options: Any
) -> Any:
    attribution = AttributionModule(module, trajectory, estimator, CaseTask("regression"))
    return attribution.attribute(
        TensorDataset(*data), TensorDataset(*QUERIES), batch_size=4, trainer=quiet(), **options
    )


RECORDED = Source(2, curvature="exact", order="recorded")
MOMENTUM = {"momentum": 0.9}
CASES: dict[str, tuple[dict[str, Any], str, tuple[int, ...], int]] = {
    # What SGD is given, what each epoch trains, the fits, and how many stages there are.
    "newly trained": (MOMENTUM, "h th th", (3,), 2),
    "frozen on the way": (MOMENTUM, "th th h", (3,), 2),
    "old buffers wait": (MOMENTUM, "th h th t th", (5,), 5),
    "nesterov": ({**MOMENTUM, "nesterov": True, "weight_decay": 0.1}, "th h th", (3,), 3),
    "dampened": ({**MOMENTUM, "dampening": 0.3}, "th h th", (3,), 3),
    "dampened, one by one": ({**MOMENTUM, "dampening": 0.3}, "h t h", (3,), 3),
    "a further fit": (MOMENTUM, "th th th", (1, 2), 2),
    "dampened fits": ({**MOMENTUM, "dampening": 0.3}, "th th th", (1, 1, 1), 3),
    "frozen between fits": (MOMENTUM, "h th th", (1, 2), 2),
    "fits and stages": (MOMENTUM, "th h th th", (1, 2, 1), 4),
}


# Each way of beginning a stage once: the others mix what these have.
SOME = [
    "newly trained",
    "old buffers wait",
    "nesterov",
    "dampened, one by one",
    "dampened fits",
    "fits and stages",
]


@pytest.mark.parametrize("name", quick(CASES, SOME))
def test_the_recorded_order_is_exact_unrolling(name: str, tmp_path: Path) -> None:
    """Least squares with a checkpoint after every step: nothing is approximated."""
    options, plan, fits, stages = CASES[name]
    module = Linear(sgd(**options))
    trajectory = record(tmp_path, module, Trains(plan), fits=fits)
    assert len(trajectory.facts.stages) == stages
    truth = unrolled_run(trajectory, module, LOSS, DATA, QUERIES)
    for estimator in (RECORDED, Unrolled()):
        found = scores(trajectory, module, estimator)
        assert found.values.shape == (3, 8)
        assert relative(found.values, truth) < 1e-9
    assert truth.abs().max() > 1e-2


def test_a_group_that_a_finetuning_callback_adds(tmp_path: Path) -> None:
    module = Linear(sgd(momentum=0.9), filtered=True)
    trajectory = record(tmp_path, module, Thaws(), fits=(3,))
    assert trajectory.facts.stages == (StageFact(0, HEAD), StageFact(2, (*TRUNK, *HEAD)))
    truth = unrolled_run(trajectory, module, LOSS, DATA, QUERIES)
    assert relative(scores(trajectory, module, RECORDED).values, truth) < 1e-9
    average = scores(trajectory, module, Source(2, curvature="exact", momentum="recursion"))
    assert 1e-6 < relative(average.values, truth) < 0.5


@pytest.mark.parametrize("make", [sgd(weight_decay=0.1), sgd(momentum=0.5), adamw])
def test_the_average_order_is_the_dense_formula(make: Any, tmp_path: Path) -> None:
    """Frozen on the way, thawed, and another fit: four stages of one segment each."""
    module = Linear(make)
    trajectory = record(tmp_path, module, Trains("th h th th"), fits=(3, 1))
    found = scores(trajectory, module, Source(segment_steps=[], curvature="exact"))
    stages = [
        TrainedStage(part, module, oracles.mean_squared_error, DATA) for part in trajectory.stages()
    ]
    cut = source_stages(stages, lambda run: run.segments(1), LOSS, QUERIES)
    assert relative(found.by_segment, torch.cat(cut)) < 1e-9
    assert found.values.shape == (3, 8)


def test_the_average_order_approaches_unrolling_with_the_rate(tmp_path: Path) -> None:
    errors = []
    for finer in (1, 2):
        module = Linear(lambda p, rate=0.1 / finer: torch.optim.SGD(p, rate))
        plan = " ".join(part for part in ("h", "th", "h") for _ in range(finer))
        fits = (2 * finer, finer)
        trajectory = record(tmp_path / str(finer), module, Trains(plan), fits=fits)
        truth = unrolled_run(trajectory, module, LOSS, DATA, QUERIES)
        steps = list(range(1, 6 * finer))
        found = scores(trajectory, module, Source(segment_steps=steps, curvature="exact"))
        errors.append(relative(found.values, truth))
    assert errors[0] < 0.2
    assert 0.4 < errors[1] / errors[0] < 0.6


def test_dampened_first_steps_beside_others_are_refused(tmp_path: Path) -> None:
    module = Linear(sgd(momentum=0.9, dampening=0.3))
    trajectory = record(tmp_path, module, Trains("h th"), fits=(2,))
    with pytest.raises(UnsupportedTrainingError, match=r"trunk.weight \(2 .*Use order='average'"):
        scores(trajectory, module, RECORDED)
    scores(trajectory, module, Source(2, curvature="exact"))


ADAM = {
    "newly trained": ("h th th", (3,)),
    "old moments wait": ("th h th", (3,)),
    "a further fit": ("th th th", (1, 2)),
}


@pytest.mark.parametrize("name", quick(ADAM, ["old moments wait", "a further fit"]))
def test_the_recorded_order_of_adam_is_exact_unrolling(name: str, tmp_path: Path) -> None:
    """A segment for every step, because it is h H h that stays the same within one."""
    plan, fits = ADAM[name]
    module = Linear(adamw)
    trajectory = record(tmp_path, module, Trains(plan), fits=fits)
    truth = unrolled_run(trajectory, module, LOSS, DATA, QUERIES)
    for estimator in (every_step(trajectory), Unrolled()):
        assert relative(scores(trajectory, module, estimator).values, truth) < 1e-9


@pytest.mark.parametrize(
    "name",
    quick(
        ["nesterov", "dampened, one by one", "fits and stages", *(f"adamw, {n}" for n in ADAM)],
        ["dampened, one by one", "adamw, old moments wait"],
    ),
)
def test_stages_of_a_what_if_run_begin_where_the_ones_before_ended(
    name: str, tmp_path: Path
) -> None:
    """With weights and the optimizer's states as the weighted training left them."""
    make, (plan, fits) = adamw, ADAM.get(name.removeprefix("adamw, "), ("", ()))
    if name in CASES:
        options, plan, fits, _ = CASES[name]
        make = sgd(**options)
    module = Linear(make)
    trajectory = record(tmp_path, module, Trains(plan), fits=fits)
    for draws in (0, 1):
        at = subset_weights(8, 0.6, 1)[0] if draws else torch.full((8,), 0.6, dtype=torch.float64)
        truth = unrolled_run(trajectory, module, LOSS, DATA, QUERIES, at=at)
        estimators: list[Any] = [every_step(trajectory)]
        if name in ("fits and stages", "adamw, old moments wait"):
            estimators.append(Unrolled())
        for estimator in estimators:
            found = scores(trajectory, module, estimator, keep=0.6, draws=draws)
            assert relative(found.values, truth) < 1e-9


def every_step(trajectory: Any) -> Source:
    steps = list(range(1, trajectory.last_step))
    return dataclasses.replace(RECORDED, segment_steps=steps)


@pytest.mark.parametrize("make", [sgd(momentum=0.9), adamw])
def test_a_last_stage_alone_goes_on_with_its_state(make: Any, tmp_path: Path) -> None:
    """Its columns are those of the whole, and neither knows where the moments came from."""
    module = Linear(make)
    trajectory = record(tmp_path, module, Trains("h th th"), fits=(3,))
    truth = unrolled_run(trajectory, module, LOSS, DATA, QUERIES, since=2)
    last = trajectory.stages()[-1]
    assert last.steps_before == dict.fromkeys(HEAD, 2)
    for estimator in (every_step(last), Unrolled()):
        assert relative(scores(last, module, estimator).values, truth) < 1e-9


def test_states_that_were_not_recorded_are_missed(tmp_path: Path) -> None:
    module = Linear(sgd(momentum=0.9))
    trajectory = record(tmp_path, module, Trains("h th"), fits=(2,), save_optimizer=False)
    with pytest.raises(UnsupportedTrainingError, match="goes on with the optimizer"):
        scores(trajectory, module, Unrolled())


# Curvature that was recorded in training.


class Classifier(LightningModule):
    """Learns something in single precision; its trunk can be frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.trunk, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.trunk(inputs).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, 0.05, momentum=0.9)


def classes(seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(120, 6, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.randn(6, 3, generator=generator)).argmax(1))


FIRST, SECOND = classes(1), classes(2)


def fit_online(
    path: Path, module: Any, data: Any, *callbacks: Any, epochs: int = 2, **options: Any
) -> Trajectory:
    settings = {"curvature": "online", "curvature_every": 1, "every_n_steps": 10, **options}
    recorder = TrajectoryRecorder(path, **settings)
    torch.manual_seed(8)
    made = trainer(*callbacks, recorder, max_epochs=epochs)
    made.fit(module, DataLoader(data, 8, shuffle=True))
    return open_trajectory(path)


@pytest.fixture(scope="module")
def thawed(tmp_path_factory: Any) -> tuple[Trajectory, nn.Module, TensorDataset]:
    """A head alone, then everything: one run."""
    module = Classifier()
    path = tmp_path_factory.mktemp("thawed")
    return fit_online(path, module, FIRST, Thaws(), epochs=4), module, FIRST


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: Any) -> tuple[list[Trajectory], nn.Module, list[TensorDataset]]:
    """Everything, then a head alone on other data: two runs."""
    module, path = Classifier(), tmp_path_factory.mktemp("tuned")
    first = fit_online(path / "first", module, FIRST)
    module.trunk.requires_grad_(False)
    second = fit_online(path / "second", module, SECOND)
    return [first, second], module, [FIRST, SECOND]


def scored(work: Any, estimator: Any) -> tuple[Any, list[str]]:
    trajectory, module, data = work
    queries = TensorDataset(*(part[:20] for part in SECOND.tensors))
    attribution = AttributionModule(module, trajectory, estimator)
    with watched_walks() as titles:
        return attribution.attribute(data, queries, trainer=quiet()), titles


def agreement(found: Tensor, expected: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1])


@pytest.mark.parametrize("order", ["average", "recorded"])
@pytest.mark.parametrize("name", ["thawed", "tuned"])
def test_each_stage_uses_its_own_statistics(name: str, order: str, request: Any) -> None:
    work = request.getfixturevalue(name)
    plain = Source(2, order=order, leading_directions=0, statistics="fitted")
    fitted, _ = scored(work, plain)
    found, titles = scored(work, Source(2, order=order))
    assert not any("covariances" in title or "eigenvalues" in title for title in titles)
    assert agreement(found.values, fitted.values) > 0.9
    stages = found.provenance["stages"]
    assert len(stages) == 2
    for number in range(2):  # each alone as well
        own = [one.stage(number).values for one in (found, fitted)]
        assert agreement(*own) > 0.9
        assert own[1].norm() > 1e-2 * fitted.values.norm()
    about = found.provenance["statistics"]
    assert [len(one["examples"]) for one in about] == [
        len(range(*stage["segments"])) for stage in stages
    ]
    assert all(count > 0 for one in about for count in one["examples"])
    assert found.provenance["fisher"] == ["true (in training)"] * 2
    assert "statistics" not in fitted.provenance


def test_statistics_of_a_stage_are_those_of_its_parameters(thawed: Any) -> None:
    trajectory = thawed[0]
    whole = trajectory.statistics
    assert [stage.start for stage in trajectory.facts.stages] == [0, 30]
    for part, start in zip(trajectory.stages(), (0, 30), strict=True):
        intervals = list(part.statistics)
        assert intervals and intervals[0][0] == 0 and intervals[-1][1] == part.last_step
        for first, last in intervals:
            own = part.statistics[first, last]
            names = {name for block in own.values() for name in block.parameters}
            assert names == set(part.facts.parameters)
            for name, block in own.items():
                assert torch.equal(block.left, whole[start + first, start + last][name].left)
                assert float(block.examples) == 8 * (last - first)


def test_a_stage_too_short_for_statistics_has_its_curvature_fitted(tmp_path: Path) -> None:
    module = Classifier()
    trajectory = fit_online(tmp_path, module, FIRST, Thaws(), epochs=4, curvature_every=40)
    found, titles = scored((trajectory, module, FIRST), Source(2))
    fitted = {title.split(",")[0] for title in titles if "covariances" in title}
    assert fitted == {"stage 1"}
    about = found.provenance["statistics"]
    assert about[0] is None and about[1]["examples"] == [8]


def test_tracin_sums_over_the_stages(thawed: Any) -> None:
    trajectory, module, data = thawed
    found, _ = scored(thawed, TracIn())
    parts = [scored((part, module, data), TracIn())[0] for part in trajectory.stages()]
    assert torch.allclose(sum(part.values for part in parts), found.values, atol=1e-6)
    assert found.by_segment.shape[0] == trajectory.num_steps // 10


def test_influence_functions_use_what_the_last_stage_knows(thawed: Any, tmp_path: Path) -> None:
    fitted, _ = scored(thawed, InfluenceFunction(statistics="fitted"))
    found, titles = scored(thawed, InfluenceFunction())
    assert not any("covariances" in title for title in titles)
    assert agreement(found.values, fitted.values) > 0.9
    # Where the last stage had a part frozen, curvature of all is fitted.
    module = Classifier()
    trajectory = fit_online(tmp_path, module, FIRST, Trains("th h"), epochs=4)
    work = (trajectory, module, FIRST)
    assert trajectory.facts.stages[-1].parameters == HEAD
    found, titles = scored(work, InfluenceFunction())
    assert any("covariances" in title for title in titles)
    assert "statistics" not in found.provenance
    with pytest.raises(ValueError, match=r"got none. Pass statistics='fitted'"):
        scored(work, InfluenceFunction(statistics="recorded"))


# What a reader is told.


def test_clipping_is_told_stage_by_stage_and_the_report_shows_it(tmp_path: Path) -> None:
    module = Linear(sgd(momentum=0.9))
    recorder = TrajectoryRecorder(tmp_path / "run", every_n_steps=1)
    made = trainer(Trains("h th"), recorder, max_epochs=4, gradient_clip_val=0.5)
    made.fit(module, DataLoader(TensorDataset(*DATA), 8))
    trajectory = open_trajectory(tmp_path / "run")
    acted = [int((part.steps.clipping != 1).sum()) for part in trajectory.stages()]
    assert all(acted)
    for estimator in (Source(1), TracIn()):
        found = scores(trajectory, module, estimator)
        notes = found.provenance["notes"]
        for number, count in enumerate(acted, start=1):
            told = f"Stage {number}: Gradient clipping by norm acted in {count} of 2 steps"
            assert sum(note.startswith(told) for note in notes) == 1
        found.save(str(tmp_path / "scores.h5"), overwrite=True)
        kept = Scores.load(str(tmp_path / "scores.h5"))
        assert kept.provenance["stages"] == found.provenance["stages"]
        path = write_report(
            kept,
            tmp_path / f"{type(estimator).__name__}.html",
            train=TensorDataset(*DATA),
            query=TensorDataset(*QUERIES),
            trajectory=trajectory,
        )
        text = " ".join(unescape(re.sub(r"<[^>]*>", " ", path.read_text())).split())
        bounds = found.provenance["segments"]
        assert bounds[0][0] == 0 and bounds[-1][1] == 4
        assert all(f"{start}–{stop}" in text for start, stop in bounds)
        assert all(note in text for note in notes)


def test_a_report_of_two_runs_says_what_each_stage_was(tuned: Any, tmp_path: Path) -> None:
    found, _ = scored(tuned, Source(1))
    path = write_report(found, tmp_path / "report.html")
    text = " ".join(unescape(re.sub(r"<[^>]*>", " ", path.read_text())).split())
    assert "trunk.weight" in text and "0–30" in text and "30–60" in text


def test_a_frozen_parameter_that_moves_is_refused(tmp_path: Path) -> None:
    class Zeros(Linear):
        """Keeps gradients as zeros, which momentum goes on to step with."""

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

    module = Zeros(sgd(momentum=0.9))
    trajectory = record(tmp_path, module, Trains("th h"), fits=(2,))
    with pytest.raises(TrajectoryMismatchError, match=r"trunk.weight was frozen .* it moved"):
        scores(trajectory, module, RECORDED)


def test_the_same_optimizer_again_is_no_stage(tmp_path: Path) -> None:
    """A module that hands out the optimizer it made before goes on with its buffers."""

    class Keeps(Linear):
        kept: Any = None

        def configure_optimizers(self) -> Any:
            self.kept = self.kept or super().configure_optimizers()
            return self.kept

    module = Keeps(sgd(momentum=0.9))
    trajectory = record(tmp_path, module, Trains("th th"), fits=(1, 1))
    assert trajectory.facts.settings["fits"] == [2]
    assert trajectory.stages() == (trajectory,)
    truth = unrolled_run(trajectory, module, LOSS, DATA, QUERIES)
    assert relative(scores(trajectory, module, RECORDED).values, truth) < 1e-9


def test_cuts_leave_no_segment_of_a_stage_without_a_checkpoint(tmp_path: Path) -> None:
    module = Linear(sgd())
    # Six steps, stages from 0 and 4, checkpoints at 3, 4 and 6: a cut at 5 would leave (4, 5].
    trajectory = record(tmp_path, module, Trains("th th h"), fits=(3,), every_n_steps=3)
    found = scores(trajectory, module, Source(6, curvature="exact"))
    assert found.provenance["segments"] == [[0, 3], [3, 4], [4, 6]]
    with pytest.raises(ValueError, match="holds no checkpoint"):
        scores(trajectory, module, Source(segment_steps=[5], curvature="exact"))
