"""A training_step sees the epoch, the step and the rates of the moment that it is asked about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.evaluation import landing_error, measure, retrain
from tests.attributing import quiet
from tests.standing import by_hand, standing_run, tracin

SIZE = 8
X = torch.randn(SIZE, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(SIZE) % 2
DATA = TensorDataset(X, Y)
BATCHES = [[0, 1, 2, 3], [4, 5, 6, 7]] * 3
EPOCHS = [0, 0, 1, 1, 2, 2]
RUN = {
    "max_epochs": 3,
    "max_steps": -1,
    "num_training_batches": 2,
    "schedulers": [{"class": "StepLR", "interval": "epoch"}],
    "loggers": ["TensorBoardLogger"],
    "data_module": None,
}


class Net(LightningModule):
    """A loss times whatever ``factor`` makes of what the step sees."""

    def __init__(self, factor: Callable[[Any], float] = lambda own: 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(3, 2).double()
        self.factor = factor
        self.batch_idx = self.dataloader_idx = -1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batch_idx = batch_idx
        return self.factor(self) * F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.3, momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Several(Net):
    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Tensor:
        self.dataloader_idx = dataloader_idx
        return super().training_step(batch, batch_idx)


class Data(LightningDataModule):
    scale = 4.0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(DATA, 4)


def logs(own: Net) -> float:
    own.log("a", 1.0)
    own.logger.experiment.add_scalar("a", 1.0, own.global_step)
    own.loggers[0].log_metrics({"a": 1.0}, step=own.global_step)
    own.trainer.logger.experiment["a"] = 1.0
    own.print("a")
    with own.trainer.profiler.profile("a"):
        return 3.0 if own.trainer.is_global_zero and own.global_rank == 0 else 1.0


def states(own: Net) -> float:
    state = own.trainer.state
    assert own.trainer.training and not own.trainer.validating and not own.trainer.sanity_checking
    return 2.0 if state.fn is TrainerFn.FITTING and state.stage is RunningStage.TRAINING else 5.0


SEEN: dict[str, tuple[Callable[[Any], float], float]] = {
    "current_epoch": (lambda own: own.current_epoch, 2),
    "trainer.current_epoch": (lambda own: 1 + own.trainer.current_epoch / 4, 1.5),
    "global_step": (lambda own: own.global_step, 5),
    "max_epochs": (lambda own: own.current_epoch / own.trainer.max_epochs, 2 / 3),
    "num_training_batches": (lambda own: own.trainer.num_training_batches, 2),
    "estimated_stepping_batches": (lambda own: own.trainer.estimated_stepping_batches, 6),
    "is_last_batch": (lambda own: 3.0 if own.trainer.is_last_batch else 1.0, 3),
    "batch_idx": (lambda own: 1.0 + own.batch_idx, 2),
    "rate": (lambda own: 1 + own.optimizers().param_groups[0]["lr"], 1 + 1 / 6),
    "trainer.optimizers": (lambda own: len(own.trainer.optimizers[0].param_groups), 1),
    "last rate": (lambda own: 1 + own.lr_schedulers().get_last_lr()[0], 1 + 1 / 6),
    "all_gather": (lambda own: float(own.all_gather(torch.tensor(3.0)).sum()), 3),
    "world_size": (lambda own: 2 * own.trainer.world_size, 2),
    "loader": (lambda own: len(own.trainer.train_dataloader.dataset), SIZE),
    "loader's length": (lambda own: len(own.trainer.train_dataloader), 2),
    "no data module": (lambda own: 2.0 if own.trainer.datamodule is None else 1.0, 2),
    "logger": (logs, 3),
    "state": (states, 2),
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("attached", [False, True])
def test_a_step_sees_the_moment_of_the_checkpoint(name: str, attached: bool) -> None:
    factor, expected = SEEN[name]
    module, plain = Net(factor), Net()
    if attached:  # to a trainer that is somewhere else by now
        module.trainer = quiet(max_epochs=100)
    held = dict(vars(module))
    scores = tracin(module, standing_run(module, BATCHES, EPOCHS, **RUN), DATA, DATA)
    losses = [F.cross_entropy(plain.net(x[None]), y[None]) for x, y in zip(X, Y, strict=True)]
    torch.testing.assert_close(scores.values, expected**2 * by_hand(plain, losses, losses))
    assert vars(module).keys() == held.keys() and module._trainer is held["_trainer"]


def test_a_step_may_take_the_number_of_its_loader() -> None:
    module = Several()
    scores = tracin(module, standing_run(module, BATCHES, EPOCHS, **RUN), DATA, DATA)
    assert bool(scores.values.any()) and (module.batch_idx, module.dataloader_idx) == (1, 0)


def test_the_data_module_is_seen_or_asked_for() -> None:
    module, plain = Net(lambda own: own.trainer.datamodule.scale), Net()
    run = standing_run(module, BATCHES, EPOCHS, **{**RUN, "data_module": "Data"})
    losses = [F.cross_entropy(plain.net(x[None]), y[None]) for x, y in zip(X, Y, strict=True)]
    scores = tracin(module, run, Data(), DATA)
    torch.testing.assert_close(scores.values, 16 * by_hand(plain, losses, losses))
    with pytest.raises(RuntimeError, match="the run had a Data: pass the data module as train"):
        tracin(module, run, DATA, DATA)
    assert module._trainer is None and "optimizers" not in vars(module)


UNKNOWN: dict[str, tuple[Callable[[Any], object], dict[str, Any], str]] = {
    "metrics": (
        lambda own: own.trainer.callback_metrics["val_loss"],
        {},
        "trainer.callback_metrics, which is not known outside of training",
    ),
    "max_epochs": (lambda own: own.trainer.max_epochs, {"max_epochs": None}, "recording does not"),
    "schedule": (lambda own: own.lr_schedulers().base_lrs, {}, "only get_last_lr"),
    "folder": (lambda own: f"{own.logger.log_dir}/pictures", {}, "a text of its logger"),
    "processes": (lambda own: own.all_gather(torch.ones(1)), {"world_size": 4}, "4 processes"),
    "strategy": (lambda own: own.trainer.strategy.model, {}, "strategy.model, which is not known"),
    "loader": (lambda own: own.trainer.train_dataloader.sampler, {}, "pass the DataLoader"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_known_is_refused(name: str) -> None:
    read, settings, message = UNKNOWN[name]
    module = Net(lambda own: (read(own), 1.0)[1])
    known = {key: value for key, value in {**RUN, **settings}.items() if value is not None}
    with pytest.raises((RuntimeError, AttributeError), match=message):
        tracin(module, standing_run(module, BATCHES, EPOCHS, **known), DATA, DATA)
    assert module._trainer is None and "log" not in vars(module)


class Warming(Net):
    """Its second loss sets in during training, and the last batch of an epoch counts more."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 2).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen = (self.current_epoch, self.global_step, batch_idx, self.trainer.max_epochs)
        loss = F.cross_entropy(self.net(batch[0]), batch[1]) * (1 + batch_idx)
        if self.current_epoch >= 1:
            share = self.current_epoch / self.trainer.max_epochs
            loss = loss + share * F.cross_entropy(self.other(batch[0]), batch[1])
        return loss * (1 + self.optimizers().param_groups[0]["lr"]) * 1.1**self.global_step


def recorded(module: Net, path: Path, checkpoints: int = 3, **options: Any) -> Trajectory:
    recorder = TrajectoryRecorder(path, num_checkpoints=checkpoints)
    quiet(max_epochs=3, callbacks=[recorder], **options).fit(module, DataLoader(DATA, 2))
    return Trajectory.load(path)


def test_each_checkpoint_has_its_epoch(tmp_path: Path) -> None:
    run = recorded(Warming(), tmp_path / "run")
    scores = AttributionModule(Warming(), run, TracIn()).attribute(DATA, DATA, trainer=quiet())
    expected = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    module = Warming()
    for epoch, step in enumerate((4, 8, 12)):
        rate = float(run.steps.learning_rate[step - 1])
        assert rate == 0.3 * 0.5**epoch
        module.load_state_dict(dict(run.checkpoints[step].parameters))
        losses = []
        for x, y in zip(X, Y, strict=True):
            loss = 4 * F.cross_entropy(module.net(x[None]), y[None])
            if epoch:
                loss = loss + epoch / 3 * F.cross_entropy(module.other(x[None]), y[None])
            losses.append(loss * (1 + rate) * 1.1 ** (step - 1))
        # Four steps; a momentum of 0.5 doubles what each does in the end.
        expected += 4 * rate / (1 - 0.5) * by_hand(module, losses, losses)
    torch.testing.assert_close(scores.values, expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replayed_step_sees_its_own_moment(accumulate: int, tmp_path: Path) -> None:
    run = recorded(Warming(), tmp_path / "run", accumulate_grad_batches=accumulate)
    module = Warming()
    ones = torch.ones(SIZE, dtype=torch.float64)
    end = retrain(run, module, None, DATA, ones)
    assert landing_error(run, end) == 0
    scores = AttributionModule(module, run, Unrolled()).attribute(DATA, DATA, trainer=quiet())
    measured = []
    for change in (1e-6, -1e-6):
        weights = ones.clone()
        weights[3] += change
        state = retrain(run, module, None, DATA, weights)
        measured.append(measure(module, None, state, DATA, trajectory=run))
    slope = (measured[0] - measured[1]) / 2e-6
    torch.testing.assert_close(scores.values[:, 3], -slope, rtol=1e-5, atol=1e-8)
    with pytest.raises(RuntimeError, match="not known at which moment of which run. Pass the traj"):
        measure(module, None, end, DATA)
    last = (2, 12 // accumulate - 1, 3, 3)
    assert module.seen == last and module._trainer is None


@pytest.mark.parametrize("estimator", [InfluenceFunction(damping=0.1), Source(num_segments=1)])
def test_other_estimators_see_it_too(estimator: Any, tmp_path: Path) -> None:
    """A factor that is seen at the last checkpoint, and the same factor written into the step."""
    seen, fixed = Net(lambda own: 1.0 + own.current_epoch), Net(lambda own: 3.0)
    runs = [standing_run(module, BATCHES, EPOCHS, **RUN) for module in (seen, fixed)]
    scores = [
        AttributionModule(module, run, estimator).attribute(DATA, DATA, trainer=quiet())
        for module, run in zip((seen, fixed), runs, strict=True)
    ]
    torch.testing.assert_close(scores[0].values, scores[1].values)


class Annealed(Net):
    """What its step multiplies by is set at the start of each epoch and batch."""

    weight = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.share = 0.1
        self.outputs: list[float] = []

    def on_train_epoch_start(self) -> None:
        self.share = (1 + self.current_epoch) / self.trainer.max_epochs
        self.outputs = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.weight = 1.0 + batch_idx

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) * self.factors()
        self.outputs.append(float(loss.detach()))
        return loss

    def factors(self) -> float:
        return self.share * self.weight


class Counting(Net):
    """One that goes on from what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.share = 0.1

    def on_train_epoch_start(self) -> None:
        self.share *= 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.share * super().training_step(batch, batch_idx)


class Ending(Counting):
    def on_train_epoch_start(self) -> None:
        pass

    def on_train_epoch_end(self) -> None:
        self.share = 1.0 + self.current_epoch


def test_what_a_hook_sets_for_an_epoch_is_seen(tmp_path: Path) -> None:
    run = recorded(Annealed(), tmp_path / "run")
    module, plain = Annealed(), Net()
    plain.load_state_dict(dict(run.checkpoints[12].parameters))
    losses = [4 * F.cross_entropy(plain.net(x[None]), y[None]) for x, y in zip(X, Y, strict=True)]
    last = AttributionModule(module, run, TracIn()).attribute(DATA, DATA, trainer=quiet())
    assert last.by_segment is not None and last.provenance["notes"] == []
    # Four steps of the last rate; a momentum of 0.5 doubles what each does in the end.
    expected = 4 * 0.075 * 2 * by_hand(plain, losses, losses)
    torch.testing.assert_close(last.by_segment[-1], expected)
    assert landing_error(run, retrain(run, module, None, DATA, torch.ones(SIZE))) == 0
    assert (module.share, module.weight) == (0.1, 1.0) and "weight" not in vars(module)


@pytest.mark.parametrize("kind", [Counting, Ending])
def test_what_cannot_be_set_again_is_said(kind: type[Counting]) -> None:
    module = kind()
    run = standing_run(module, BATCHES, EPOCHS, **RUN)
    with pytest.warns(UserWarning, match=r"reads self.share, which on_train_epoch_\w+ sets"):
        scores = tracin(module, run, DATA, DATA)
    assert ["self.share" in note for note in scores.provenance["notes"]] == [True]
    assert module.share == 0.1


class CountingSteps(Net):
    """One that counts the calls of its step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.logged = 0, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.logged += 1
        self.log("calls", self.logged)
        return self.warm_up() * super().training_step(batch, batch_idx)

    def warm_up(self) -> float:
        self.calls += 1
        return min(1.0, self.calls / 2)


class Smoothed(nn.Module):
    """A part with a running mean that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.used = 1.0, 1.0

    def divided(self, loss: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * float(loss.detach())
        return loss / self.mean


class SmoothedLoss(Net):
    def __init__(self) -> None:
        super().__init__()
        self.smoothed = Smoothed()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.smoothed.divided(super().training_step(batch, batch_idx))


@pytest.mark.parametrize(
    ("kind", "name"), [(CountingSteps, "self.calls"), (SmoothedLoss, "self.smoothed.mean")]
)
def test_what_a_step_carries_on_is_said(kind: type[Net], name: str) -> None:
    module = kind()
    run = standing_run(module, BATCHES, EPOCHS, **RUN)
    with pytest.warns(UserWarning, match=rf"carries {name} on from batch to batch"):
        (note,) = tracin(module, run, DATA, DATA).provenance["notes"]
    assert f"carries {name} on" in note


def test_several_processes_count_their_batches_side_by_side() -> None:
    """Two processes, four batches each in an epoch: a step's batches alternate between them."""
    module = Net(lambda own: 1.0 + own.batch_idx)
    batches = [[n % SIZE] for n in range(16)]
    run = standing_run(module, batches, [0] * 8 + [1] * 8, **{**RUN, "world_size": 2})
    tracin(module, run, DATA, DATA)
    assert module.batch_idx == 3


def test_numbers_come_in_the_precision_of_the_run(tmp_path: Path) -> None:
    single = TensorDataset(X.float(), Y)
    module = Net().float()
    recorder = TrajectoryRecorder(tmp_path / "run", num_checkpoints=1)
    options = {"max_epochs": 1, "precision": "64-true", "callbacks": [recorder]}
    quiet(**options).fit(module, DataLoader(single, 4))
    run = Trajectory.load(tmp_path / "run")
    exact = X.float().double()
    losses = [F.cross_entropy(module.net(x[None]), y[None]) for x, y in zip(exact, Y, strict=True)]
    # Two steps of rate 0.3, doubled by the momentum.
    expected = 2 * 0.3 * 2 * by_hand(module, losses, losses)
    scores = AttributionModule(module, run, TracIn()).attribute(single, single, trainer=quiet())
    torch.testing.assert_close(scores.values, expected)
    assert landing_error(run, retrain(run, module, None, single, torch.ones(SIZE))) == 0


def test_a_trainer_of_the_other_package_is_refused() -> None:
    other = type("Trainer", (SimpleNamespace,), {"__module__": "pytorch_lightning.trainer.trainer"})
    module = Net()
    attribution = AttributionModule(module, standing_run(module, BATCHES, EPOCHS, **RUN), TracIn())
    for ask in (attribution.attribute, attribution.plan):
        with pytest.raises(TypeError, match=r"pytorch_lightning.*expected a lightning.pytorch"):
            ask(DATA, DATA, trainer=other())
