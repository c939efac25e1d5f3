"""Features of the recorder that were made apart, used together."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.callbacks import StochasticWeightAveraging as Averaging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _len_torch_function_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from tda_lightning import TrajectoryRecorder
from tda_lightning.recording.trainer_hooks import ReplacedMethod
from tda_lightning.records.errors import ResumeError, UnsupportedTrainingError
from tda_lightning.store import layout, open_trajectory
from tda_lightning.store.writer import TrajectoryWriter
from tests.processes import results
from tests.recording.test_online_curvature import Model, convolutions, data, mlp, pictures, vectors
from tests.resumable import Resumable, differences, train
from tests.runs import Net, Numbered, adamw, fit, loader, sgd, trainer

pytestmark = pytest.mark.filterwarnings("ignore")

ONLINE = {"curvature": "online", "curvature_every": 1}


# Training that is recorded is training that is not, bit for bit, and nothing stays behind.


class Skips(Model):
    """A dictionary, and now and then nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else {"loss": super().training_step(batch, batch_idx)}


class Views(Model):
    """Two passes, two losses, and metrics on the way."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, target = batch
        one, other = self(inputs), self(inputs + 0.1)
        with torch.no_grad():
            F.cross_entropy(self(inputs), target)
        self(inputs)  # leads nowhere
        return F.cross_entropy(one, target) + 0.5 * F.mse_loss(one, other)


class Counting(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class InMode(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with Counting():
            return super().training_step(batch, batch_idx)


class Validates(Model):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self(batch[0]), batch[1])


class Fails(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 3:
            raise RuntimeError("of the user's own")
        return loss


class Recomputed(nn.Module):
    """Batch norm and dropout in a part whose forward pass is run again in every backward pass."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 5), nn.Linear(5, 3)
        self.part = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(self.part, self.before(inputs), use_reentrant=self.reentrant)
        return self.after(hidden)


class HalfSeen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second((self.first(inputs) + inputs @ self.first.weight.square()).tanh())


class Unordered(IterableDataset):
    def __iter__(self) -> Any:
        return iter(data(vectors))


class SkipsTheRest(Model):
    """Ends the first epoch in the midst of an accumulation."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None


Case = dict[str, Any]
CASES: dict[str, Case] = {
    "batches skipped": {"module": lambda: Skips(mlp())},
    "accumulated, skipped": {"module": lambda: Skips(mlp()), "accumulate_grad_batches": 2},
    "two views": {"module": lambda: Views(mlp())},
    "a mode of the user's": {"module": lambda: InMode(mlp())},
    "an error": {"module": lambda: Fails(mlp())},
    "recomputed": {"module": lambda: Model(Recomputed())},
    "an epoch cut short": {
        "module": lambda: SkipsTheRest(mlp()),
        "accumulate_grad_batches": 2,
    },
    "validation": {"module": lambda: Validates(mlp()), "val_check_interval": 2},
    "limited": {"limit_train_batches": 3, "gradient_clip_val": 0.1},
    "overfitted": {"overfit_batches": 2},
    "last batch smaller": {"size": 37, "inputs": pictures, "module": lambda: Model(convolutions())},
    "single examples": {"size": 7, "batch_size": 1},
    "no indices": {"dataset": Unordered, "max_steps": 6},
    "SWA": {
        "module": lambda: Model(convolutions()),
        "inputs": pictures,
        "callbacks": [lambda: Averaging(0.01, swa_epoch_start=1, annealing_epochs=1)],
        "max_epochs": 3,
    },
    "EMA": {
        "module": lambda: Validates(convolutions()),
        "inputs": pictures,
        "callbacks": [lambda: EMAWeightAveraging(decay=0.9)],
        "val_check_interval": 2,
    },
}


def run_case(case: Case, recorders: list[TrajectoryRecorder]) -> tuple[Any, dict[str, Any]]:
    """The module, and what a fit leaves to be seen."""
    case = dict(case)
    make = case.pop("module", lambda: Model(mlp()))
    inputs, size, batch = (
        case.pop("inputs", vectors),
        case.pop("size", 40),
        case.pop("batch_size", 8),
    )
    dataset = case.pop("dataset", lambda: data(inputs, size))()
    callbacks = [make_one() for make_one in case.pop("callbacks", [])]
    seed_everything(7, verbose=False)
    module = make()
    train_loader = DataLoader(dataset, batch, shuffle=not isinstance(dataset, IterableDataset))
    held = dict(vars(train_loader))
    made = trainer(*recorders, *callbacks, **case)
    validation = DataLoader(data(inputs, 16), 8) if isinstance(module, Validates) else None
    error = None
    try:
        made.fit(module, train_loader, validation)
    except RuntimeError as raised:
        error = str(raised)
    optimizer = made.optimizers[0]
    return module, {
        "error": error,
        "attributes": [sorted(vars(o)) for o in (made, made.strategy, made.precision_plugin)],
        "module": sorted(vars(module)),
        "loader": sorted(k for k, v in vars(train_loader).items() if held.get(k) is not v),
        "hooks": [
            len(optimizer._optimizer_step_pre_hooks),
            len(optimizer._optimizer_step_post_hooks),
        ],
        "parameter hooks": [p._backward_hooks for p in module.parameters()],
        "gradients": [p.grad is None for p in module.parameters()],
        "random": torch.get_rng_state().tolist(),
        "modes": _len_torch_function_stack(),
        "seen": [type(c).__name__ for c in made.callbacks if not isinstance(c, TrajectoryRecorder)],
    }


@cache
def plain_run(case: str) -> tuple[Any, dict[str, Any]]:
    """The training without a recorder, once for both kinds of Fisher matrix."""
    return run_case(CASES[case], [])


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_changed_or_left_behind(case: str, fisher: str, tmp_path: Path) -> None:
    recorders = [TrajectoryRecorder(tmp_path / name, fisher=fisher, **ONLINE) for name in "ab"]
    plain, before = plain_run(case)
    recorded, after = run_case(CASES[case], recorders)
    assert after == before
    expected, found = plain.state_dict(), recorded.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    # Two recorders see the same, and every example of every step was counted.
    first, second = (open_trajectory(tmp_path / name) for name in "ab")
    assert first.num_steps == second.num_steps > 0
    counted = [
        {float(b.examples) for b in t.merged_statistics(0, t.num_steps).values()}
        for t in (first, second)
    ]
    used = float(len(first.steps.examples)) if case != "no indices" else 48.0
    assert counted == [{used}, {used}]


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (HalfSeen, r"Parameter network.first.weight .*cannot see"),
        (lambda: Recomputed(reentrant=True), r"use_reentrant=True.*curvature=None"),
    ],
)
def test_uses_that_cannot_be_seen_are_refused(
    network: Callable[[], nn.Module], message: str, fisher: str, tmp_path: Path
) -> None:
    recorder = TrajectoryRecorder(tmp_path, fisher=fisher, **ONLINE)
    with pytest.raises(UnsupportedTrainingError, match=message):
        trainer(recorder).fit(Model(network()), DataLoader(data(vectors), 8))


def test_the_empirical_fisher_of_own_losses_sees_everything_too(tmp_path: Path) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(inputs @ self.first.weight.square())

    recorder = TrajectoryRecorder(tmp_path, fisher="empirical", **ONLINE)
    module = Model(Hidden(), lambda o, y: o.square().mean())
    with pytest.raises(UnsupportedTrainingError, match=r"Parameter network.first.weight"):
        trainer(recorder).fit(module, DataLoader(data(vectors), 8))


def test_a_penalty_is_no_hindrance_to_the_empirical_fisher(tmp_path: Path) -> None:
    class Penalised(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            penalty = sum(p.square().sum() for p in self.parameters())
            return super().training_step(batch, batch_idx) + 0.01 * penalty

    recorder = TrajectoryRecorder(tmp_path, fisher="empirical", **ONLINE)
    trainer(recorder).fit(Penalised(mlp()), DataLoader(data(vectors), 8))
    assert open_trajectory(tmp_path).merged_statistics(0, 10)


def test_a_module_compiled_by_lightning_is_refused(tmp_path: Path) -> None:
    compiled = torch.compile(Model(mlp()), backend="eager")
    recorder = TrajectoryRecorder(tmp_path, **ONLINE)
    with pytest.raises(UnsupportedTrainingError, match=r"torch.compile hides"):
        trainer(recorder).fit(compiled, DataLoader(data(vectors), 8))


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    module = Model(mlp())
    module.automatic_optimization = False
    made = trainer(TrajectoryRecorder(tmp_path, **ONLINE))
    with pytest.raises(UnsupportedTrainingError, match="manual optimization"):
        made.fit(module, DataLoader(data(vectors), 8))


def test_further_uses_of_the_trainer(tmp_path: Path) -> None:
    """A second fit goes on, and evaluation is none of the recorder's business."""
    recorder = TrajectoryRecorder(tmp_path, every_n_steps=4, **ONLINE)
    module, batches = Validates(mlp()), DataLoader(data(vectors), 8)
    made = trainer(recorder, max_epochs=1)
    made.fit(module, batches)
    made.validate(module, batches, verbose=False)
    made.fit_loop.max_epochs = 2
    made.fit(module, batches)
    trajectory = open_trajectory(tmp_path)
    assert list(trajectory.statistics) == [(0, 4), (4, 5), (5, 8), (8, 10)]
    assert {float(b.examples) for b in trajectory.merged_statistics(0, 10).values()} == {80.0}


# Two recorders, of which either ends first.


class Owner:
    def method(self, value: int) -> str:
        return f"own {value}"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("instance", [False, True])
def test_wrappers_end_in_any_order(order: tuple[int, ...], instance: bool) -> None:
    owner = Owner()
    if instance:
        vars(owner)["method"] = lambda value: f"own {value}"
    before = dict(vars(owner))
    wrappers = [
        ReplacedMethod(owner, "method", lambda inner, value, n=n: f"{n} {inner(value)}")
        for n in range(3)
    ]
    left = {0, 1, 2}
    for number in order:
        assert owner.method(5) == " ".join([*map(str, sorted(left, reverse=True)), "own 5"])
        wrappers[number].remove()
        left.remove(number)
    assert vars(owner) == before


@pytest.mark.parametrize("failing", ["a", "b"])
def test_a_recorder_that_gives_up_takes_nothing_from_another(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = TrajectoryWriter.write_statistics

    def full(self: TrajectoryWriter, *args: Any) -> None:
        if self.root.name == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *args)

    monkeypatch.setattr(TrajectoryWriter, "write_statistics", full)

    class Freezes(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.network[0].requires_grad_(trainer.global_step < 4)

    recorders = [
        TrajectoryRecorder(tmp_path / n, every_n_steps=2, on_error="warn", **ONLINE) for n in "ab"
    ]
    _, left = run_case({"callbacks": [Freezes]}, recorders)
    _, plain = run_case({"callbacks": [Freezes]}, [])
    assert left == plain
    other = open_trajectory(tmp_path / ("b" if failing == "a" else "a"))
    assert [stage.start for stage in other.facts.stages] == [0, 4]
    assert float(other.merged_statistics(0, 10)["network.2"].examples) == 80
    assert len(other.steps.examples) == 80
    assert open_trajectory(tmp_path / failing).last_step == 0


# Resumed.


class Squared(Resumable):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        self.seen.append(index.tolist())
        return F.mse_loss(self.net(x), y)


class Unfreezes(Callback):
    """At step 6, the first of epoch 1. (Lightning's BaseFinetuning does not unfreeze again when
    training resumes after its epoch: that run is another one.)"""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.net[0].requires_grad_(trainer.global_step >= 6)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[0].requires_grad_(False)


def scaled() -> list[MixedPrecision]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3, growth_factor=64.0)
    return [MixedPrecision("16-mixed", "cpu", scaler)]


RESUMED: dict[str, Case] = {
    "true": {"recorder": {**ONLINE}},
    "empirical": {"recorder": {**ONLINE, "fisher": "empirical", "curvature_dtype": "float64"}},
    "clipped, accumulated": {
        "recorder": {**ONLINE},
        "gradient_clip_val": 0.2,
        "accumulate_grad_batches": 2,
        "optimizers": adamw,
        "step": 2,
    },
    "skipped steps": {"recorder": {**ONLINE}, "plugins": scaled, "max_epochs": 3},
    "in the second stage": {
        "recorder": {**ONLINE},
        "callbacks": Unfreezes,
        "step": 9,
    },
    "at a stage's start": {
        "recorder": {**ONLINE},
        "callbacks": Unfreezes,
        "step": 6,
    },
    "before a stage": {
        "recorder": {**ONLINE},
        "callbacks": Unfreezes,
        "step": 4,
    },
}


@pytest.mark.parametrize("case", RESUMED)
def test_what_is_resumed_equals_the_uninterrupted_run(case: str, tmp_path: Path) -> None:
    options = dict(RESUMED[case])
    step, make = options.pop("step", 5), options.pop("optimizers", sgd)
    plugins, callbacks = options.pop("plugins", list), options.pop("callbacks", None)
    options["recorder"] = {"every_n_steps": 4, **options["recorder"]}

    def once(path: Path, **more: Any) -> None:
        last = (callbacks(),) if callbacks else ()
        torch.manual_seed(7)
        module = Squared(make)
        train(path, module=module, last=last, plugins=plugins(), **options, **more)

    once(tmp_path / "whole", kept=tmp_path / "kept", every=1)
    run = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    once(run, resume=tmp_path / "kept" / f"{step}.ckpt")
    count, differing = differences(tmp_path / "whole", run)
    assert count > 100
    assert not differing
    trajectory = open_trajectory(run)
    if case == "skipped steps":
        assert trajectory.facts.settings["skipped_steps"] > 2
    if callbacks:
        assert [stage.start for stage in trajectory.facts.stages] == [0, 6]


def test_a_stage_without_a_row_is_announced_again(tmp_path: Path) -> None:
    """Killed between the announcement and the first step."""

    class Dies(Callback):
        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                shutil.copytree(tmp_path / "whole", tmp_path / "killed")

    recorder = {"every_n_steps": 4, **ONLINE}
    for path, last, resume in (
        ("whole", (Unfreezes(), Dies()), None),
        ("killed", (Unfreezes(),), tmp_path / "kept" / "5.ckpt"),
    ):
        torch.manual_seed(7)
        train(
            tmp_path / path,
            module=Squared(),
            last=last,
            recorder=recorder,
            kept=tmp_path / "kept" if resume is None else None,
            every=5,
            resume=resume,
        )
    assert not differences(tmp_path / "whole", tmp_path / "killed")[1]


@pytest.mark.parametrize(
    ("before", "now"),
    [({}, ONLINE), (ONLINE, {}), (ONLINE, {**ONLINE, "fisher": "empirical"})],
)
def test_other_curvature_is_not_resumed(before: Any, now: Any, tmp_path: Path) -> None:
    train(tmp_path / "run", module=Squared(), kept=tmp_path / "kept", recorder=before)
    found = sorted(p.name for p in layout.checkpoint_files(tmp_path / "run").values())
    with pytest.raises(
        ResumeError, match=r"statistics would be gathered in another way.*Resume with"
    ):
        train(
            tmp_path / "run",
            module=Squared(),
            resume=tmp_path / "kept" / "4.ckpt",
            recorder=now,
        )
    assert sorted(p.name for p in layout.checkpoint_files(tmp_path / "run").values()) == found


# In several processes.


class Plain(Net):
    def __init__(self, optimizers: Any = None) -> None:
        super().__init__(optimizers)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        self.seen.append(index.tolist())
        return F.mse_loss(self.net(x), y)


class FreezesLate(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[0].requires_grad_(trainer.current_epoch == 0)


TOGETHER: dict[str, Case] = {
    "clipped by norm": {"gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "stages": {"callbacks": (FreezesLate,), "strategy": "ddp_find_unused_parameters_true"},
    "skipped steps": {"plugins": scaled, "max_epochs": 4},
    "empirical": {"recorder": {"fisher": "empirical"}, "accumulate_grad_batches": 2},
    "disk full": {"recorder": {"on_error": "warn"}},
}


def run_together(rank: int, root: Path) -> dict[str, Any]:
    write, found = TrajectoryWriter.write_statistics, {}

    def full(self: TrajectoryWriter, *args: Any) -> None:
        if self.root.name == "disk full":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *args)

    TrajectoryWriter.write_statistics = full  # type: ignore[method-assign]
    for case, options in TOGETHER.items():
        weights = []
        for path in (None, root / case):
            given = {"strategy": "ddp", "devices": 2, **options}
            given["callbacks"] = tuple(make() for make in given.pop("callbacks", ()))
            given["plugins"] = given.pop("plugins", list)()
            given["recorder"] = {"every_n_steps": 2, **ONLINE, **given.pop("recorder", {})}
            seed_everything(7, verbose=False)
            module = fit(path, lambda: loader(Numbered(24), shuffle=True), module=Plain(), **given)
            weights.append([p.detach().clone() for p in module.parameters()])
        same = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
        found[case] = {"same": same, "examples": sum(map(len, module.seen))}
    return found


def test_in_two_processes(tmp_path: Path) -> None:
    found = results(run_together, tmp_path)
    for case in TOGETHER:
        assert all(each[case]["same"] for each in found), case
        trajectory = open_trajectory(tmp_path / case)
        if case == "disk full":
            assert trajectory.last_step == 0
            continue
        steps = trajectory.steps
        assert trajectory.num_steps > 2, case
        counted = trajectory.merged_statistics(0, trajectory.num_steps)["net.2"]
        assert float(counted.examples) == len(steps.examples), case
        if case == "skipped steps":
            assert trajectory.facts.settings["skipped_steps"] > 0
        else:
            assert len(steps.examples) == sum(each[case]["examples"] for each in found)
        if case.startswith("clipped"):
            assert float(steps.clipping.min()) < 0.9
        if case == "stages":
            assert [stage.start for stage in trajectory.facts.stages] == [0, 3]
