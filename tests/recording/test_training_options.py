"""What the recorder writes under Lightning's training options, against a loop in torch alone."""

from __future__ import annotations

import copy
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Subset

from tda_lightning import AttributionModule
from tda_lightning.estimators import Source, TracIn
from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.store import open_trajectory
from tda_lightning.store.inspect import describe
from tests.attributing import quiet
from tests.plain_loop import Small, epochs, loss_of, require_agreement, train
from tests.runs import Numbered, Stream, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def record(
    path: Path,
    module: Any,
    data: Any = None,
    *callbacks: Any,
    validation: Any = None,
    **options: Any,
) -> Any:
    """Train ``module``, recording every step; returns the trajectory."""
    recorder = TrajectoryRecorder(path, every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The recorder comes last: the others see every hook before it, unless it sees to that.
        fitting = trainer(*callbacks, recorder, **options)
        fitting.fit(module, loader() if data is None else data, validation)
    return open_trajectory(path)


def sgd(net: nn.Module, **options: Any) -> Any:
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


class Halves(Small):
    """Clips in a way of its own: steep gradients are halved."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        halve([p for p in self.parameters() if p.grad is not None])


class HalvesOnTheWay(Small):
    """The same in a hook."""

    def on_after_backward(self) -> None:
        halve([p for p in self.parameters() if p.grad is not None])


class HalvesBeforeTheStep(Small):
    def on_before_optimizer_step(self, *_: Any) -> None:
        halve([p for p in self.parameters() if p.grad is not None])


def halve(parameters: list[nn.Parameter]) -> None:
    if torch.cat([p.grad.reshape(-1) for p in parameters]).norm() > 1:
        for parameter in parameters:
            parameter.grad.mul_(0.5)


class Checkpointing(Small):
    """Computes its activations again in the backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = checkpoint(self.net[2], self.net[1](self.net[0](batch[0])), use_reentrant=False)
        return (self.net[3](hidden) - batch[1]).square().mean()


def by_norm(parameters: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)


def by_value(parameters: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_value_(parameters, 0.2)


def nesterov(net: nn.Module) -> Any:
    """An implementation that writes into the gradients."""
    return sgd(net, nesterov=True, foreach=True)


SCHEDULES: dict[str, tuple[Any, str]] = {
    "by steps": (lambda o: LambdaLR(o, lambda step: 0.9**step), "step"),
    "by epochs": (lambda o: StepLR(o, 1, 0.5), "epoch"),
    "warm restarts": (lambda o: CosineAnnealingWarmRestarts(o, 4, T_mult=2), "step"),
    "one cycle": (lambda o: OneCycleLR(o, 0.3, total_steps=40, cycle_momentum=True), "step"),
    "plateau": (lambda o: ReduceLROnPlateau(o, factor=0.3, patience=0, threshold=0.5), "epoch"),
}

# Options of the trainer (module, callbacks, data besides) and of the plain loop.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clipped by norm": ({"gradient_clip_val": 0.5}, {"clip": by_norm}),
    "clipped by value": (
        {"gradient_clip_val": 0.2, "gradient_clip_algorithm": "value"},
        {"clip": by_value},
    ),
    "clipped by the module": ({"module": Halves}, {"clip": halve}),
    "clipped after the backward pass": ({"module": HalvesOnTheWay}, {"clip": halve}),
    "clipped before the step": ({"module": HalvesBeforeTheStep}, {"clip": halve}),
    "clipped, gradients overwritten": (
        {"gradient_clip_val": 0.5, "optimizer": nesterov},
        {"clip": by_norm},
    ),
    "accumulated with a rest": ({"accumulate_grad_batches": 4}, {"accumulate": lambda _: 4}),
    "accumulated without a rest": ({"accumulate_grad_batches": 3}, {"accumulate": lambda _: 3}),
    "accumulated and clipped": (
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5},
        {"accumulate": lambda _: 4, "clip": by_norm},
    ),
    "accumulation by epoch": (
        {"callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 4, 2: 2})], "max_epochs": 3},
        {"accumulate": lambda epoch: (1, 4, 2)[epoch], "data": epochs(3)},
    ),
    "limited": ({"limit_train_batches": 3}, {"data": epochs(limit=3)}),
    "a limited part": ({"limit_train_batches": 0.5}, {"data": epochs(limit=3)}),
    "stopped by steps": (
        {"max_steps": 8, "max_epochs": -1},
        {"max_steps": 8},
    ),
    "validation in mid-epoch": ({"validation": loader, "val_check_interval": 2}, {}),
    "bf16 mixed": ({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16}),
    "anomalies looked for": ({"detect_anomaly": True}, {}),
    "activations computed again": ({"module": Checkpointing}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_record_is_that_of_a_plain_loop(case: str, tmp_path: Path) -> None:
    options, plain = (dict(part) for part in CASES[case])
    make = options.pop("optimizer", sgd)
    module = options.pop("module", Small)(make)
    net = copy.deepcopy(module.net)
    callbacks = options.pop("callbacks", list)()
    validation = options.pop("validation", lambda: None)()
    trajectory = record(tmp_path, module, None, *callbacks, validation=validation, **options)
    log = train(net, plain.pop("data", epochs()), make(net), **plain)
    require_agreement(trajectory, log)
    assert len(trajectory.checkpoints) == len(log.states)
    clipped = "clip" in plain
    assert (min(log.clipping) < 0.99) == clipped
    if not clipped:
        assert bool((trajectory.steps.clipping == 1).all())
    assert trajectory.facts.settings["skipped_steps"] == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_and_momenta_are_those_that_were_applied(name: str, tmp_path: Path) -> None:
    make, interval = SCHEDULES[name]
    plateau = name == "plateau"

    def scheduled(net: nn.Module) -> Any:
        optimizer = sgd(net)
        config = {"scheduler": make(optimizer), "interval": interval, "monitor": "loss_epoch"}
        return [optimizer], [config]

    module = Small(scheduled)
    net = copy.deepcopy(module.net)
    trajectory = record(tmp_path, module, max_epochs=4)
    optimizer = sgd(net)
    log = train(
        net,
        epochs(4),
        optimizer,
        scheduler=make(optimizer),
        interval=interval,
        monitor=plateau,
    )
    require_agreement(trajectory, log)
    assert len({rate for (rate,) in log.rates}) > 1
    assert (len(set(log.momenta)) > 1) == (name == "one cycle")


def in_bf16(net: nn.Module, batch: Any) -> Tensor:
    return loss_of(net, [part.bfloat16() for part in batch])


def test_bf16_weights_are_kept_in_their_own_type(tmp_path: Path) -> None:
    module = Small(sgd)
    net = copy.deepcopy(module.net).bfloat16()
    trajectory = record(tmp_path, module, precision="bf16-true")
    log = train(net, epochs(), sgd(net), loss=in_bf16)
    require_agreement(trajectory, log)
    assert trajectory.facts.parameters["net.0.weight"].dtype == "bfloat16"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_that_the_scaler_skips_is_no_step(
    clip: float | None, accumulate: int, tmp_path: Path
) -> None:
    def scaler() -> Any:
        # Grows every third step that went well, so steps are skipped in mid-run as well.
        return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)

    module = Small(sgd)
    net = copy.deepcopy(module.net)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler())
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trajectory = record(tmp_path, module, max_epochs=6, plugins=[precision], **options)
    log = train(
        net,
        epochs(6),
        sgd(net),
        accumulate=lambda _: accumulate,
        clip=None if clip is None else by_norm,
        dtype=torch.float16,
        scaler=scaler(),
    )
    require_agreement(trajectory, log)
    assert 2 <= log.skipped < len(log.epoch)
    assert trajectory.facts.settings["skipped_steps"] == log.skipped
    assert list(trajectory.checkpoints) == list(range(len(log.epoch) + 1))
    # Not only at the beginning: rows of one epoch, then another, with steps missing between.
    per_epoch = [log.epoch.count(epoch) for epoch in range(6)]
    assert len(set(per_epoch[1:])) > 1


def test_a_fused_optimizer_skips_too_and_its_norms_are_unscaled(tmp_path: Path) -> None:
    def fused(net: nn.Module) -> Any:
        # (Without momentum: torch fills the buffer with NaN when it skips the first step.)
        return sgd(net, momentum=0.0, fused=True)

    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)

    module = Small(fused)
    net = copy.deepcopy(module.net)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler())
    trajectory = record(tmp_path, module, max_epochs=4, plugins=[precision])
    # Unscaling first or inside the fused kernel rounds alike: the scale is a power of two.
    plain = sgd(net, momentum=0.0)
    log = train(net, epochs(4), plain, dtype=torch.float16, scaler=scaler())
    assert log.skipped > 1
    assert trajectory.facts.settings["skipped_steps"] == log.skipped
    assert trajectory.num_steps == len(log.epoch)
    norms = trajectory.steps.gradient_norm
    torch.testing.assert_close(norms, torch.tensor(log.norms).double(), rtol=1e-3, atol=0)


def test_parameters_without_a_shape_are_refused(tmp_path: Path) -> None:
    module = Small(sgd)
    module.net = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 1))
    with pytest.raises(
        UnsupportedTrainingError, match=r"net\.0\.weight, net\.0\.bias have no shape"
    ):
        record(tmp_path, module)


def test_a_step_without_any_gradient_is_no_step(tmp_path: Path) -> None:
    class Skips(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

    trajectory = record(tmp_path, Skips(sgd), max_epochs=1)
    assert trajectory.num_steps == 4
    assert trajectory.facts.settings["skipped_steps"] == 2
    recorded = [trajectory.steps.batches(row)[0].tolist()[0] for row in range(4)]
    assert recorded == [0, 8, 12, 20]


# Ends of training.


class Stops(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 5


class Sleeps(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("callbacks", "options"),
    [
        ([Stops()], {}),
        ([Sleeps()], {"max_epochs": 1000, "max_time": {"seconds": 2}}),
        ([EarlyStopping("validation", patience=0, min_delta=10.0)], {"max_epochs": 50}),
        ([EarlyStopping("validation", patience=0, min_delta=10.0)], {"val_check_interval": 2}),
        ([Stops()], {"accumulate_grad_batches": 4, "max_epochs": 5}),
    ],
    ids=["should_stop", "max_time", "early stopping", "in mid-epoch", "in mid-epoch, accumulated"],
)
def test_a_run_that_ends_early_has_every_step_that_it_took(
    callbacks: list[Any], options: dict[str, Any], tmp_path: Path
) -> None:
    module = Small(sgd)
    net = copy.deepcopy(module.net)
    trajectory = record(tmp_path, module, None, *callbacks, validation=loader(), **options)
    taken = trajectory.num_steps
    assert 1 < taken < 200
    divisor = options.get("accumulate_grad_batches", 1)
    log = train(net, epochs(100), sgd(net), accumulate=lambda _: divisor, max_steps=taken)
    require_agreement(trajectory, log)
    ended = {f"net.{name}": value for name, value in module.net.state_dict().items()}
    last = trajectory.checkpoints[taken]
    assert all(torch.equal(last.parameters[name], ended[name]) for name in last.parameters)


def test_several_fits_of_one_module_are_several_runs(tmp_path: Path) -> None:
    module = Small(sgd)
    net = copy.deepcopy(module.net)
    for number in range(3):
        trajectory = record(tmp_path / str(number), module, max_epochs=1)
        require_agreement(trajectory, train(net, epochs(1), sgd(net)))


def test_several_fits_of_one_trainer_are_one_run(tmp_path: Path) -> None:
    module = Small(sgd)
    net = copy.deepcopy(module.net)
    fitting = trainer(TrajectoryRecorder(tmp_path, every_n_steps=1), max_epochs=0)
    for epoch in range(3):
        fitting.fit_loop.max_epochs = epoch + 1
        fitting.fit(module, loader())

    def anew(epoch: int, optimizer: Any) -> None:
        optimizer.state.clear()  # each fit makes an optimizer of its own

    log = train(net, epochs(3), sgd(net), before_epoch=anew)
    require_agreement(open_trajectory(tmp_path), log)


# Data.


class Growing(LightningDataModule):
    """A new loader, with another batch size, in every epoch."""

    def train_dataloader(self) -> Any:
        return loader(batch_size=4 + 2 * self.trainer.current_epoch)


def test_loaders_of_another_length_in_every_epoch(tmp_path: Path) -> None:
    module = Small(sgd)
    net = copy.deepcopy(module.net)
    trajectory = record(
        tmp_path, module, Growing(), max_epochs=3, reload_dataloaders_every_n_epochs=1
    )
    data = [epochs(1, batch=4 + 2 * epoch)[0] for epoch in range(3)]
    require_agreement(trajectory, train(net, data, sgd(net)))


class Redraws(LightningDataModule):
    """Another half of the data in every epoch: an index stands for another example each time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def train_dataloader(self) -> Any:
        first = self.trainer.current_epoch
        return loader(Subset(Numbered(), range(first, first + self.size)))


def test_data_sets_that_change_under_the_indices_are_refused(tmp_path: Path) -> None:
    message = r"data set of epoch 1 is not the one that training began with: .*10 differ.*sampler"
    with pytest.raises(UnsupportedTrainingError, match=message):
        record(tmp_path, Small(sgd), Redraws(10), reload_dataloaders_every_n_epochs=1)
    assert open_trajectory(tmp_path).last_step == 3


def test_a_stream_has_no_indices_and_says_so(tmp_path: Path) -> None:
    module = Small(sgd)
    net = copy.deepcopy(module.net)
    trajectory = record(tmp_path, module, loader(Stream()))
    log = train(net, epochs(), sgd(net))
    absent = "absent: the training data set is an IterableDataset"
    assert trajectory.facts.settings["indices"] == absent
    assert trajectory.facts.num_examples is None
    require_agreement(trajectory, log)
    assert describe(tmp_path).facts.settings["indices"] == absent
    assert len(trajectory.steps.examples) == 0
    attribution = AttributionModule(Small(), trajectory, Source(1, order="recorded"))
    data = Numbered()
    with pytest.raises(UnsupportedTrainingError, match=r"no example indices.*order='average'"):
        attribution.attribute(data, data, trainer=quiet())
    average = AttributionModule(Small(), trajectory, Source(1, curvature="identity"))
    assert average.attribute(data, data, trainer=quiet()).values.isfinite().all()


# Callbacks that put other weights into the module.


class Fails(Callback):
    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4 and not trainer.sanity_checking:
            raise ZeroDivisionError("as planned")


@pytest.mark.parametrize("interval", [1, 2])
def test_averaged_weights_are_never_recorded(interval: int, tmp_path: Path) -> None:
    module = Small(sgd)
    net = copy.deepcopy(module.net)
    averaging = EMAWeightAveraging(decay=0.5)
    trajectory = record(
        tmp_path, module, None, averaging, validation=loader(), val_check_interval=interval
    )
    require_agreement(trajectory, train(net, epochs(), sgd(net)))
    last = trajectory.checkpoints[12].parameters["net.0.weight"]
    assert not torch.equal(module.net[0].weight, last)  # the module ends with the average
    attribution = AttributionModule(module, str(tmp_path), TracIn())
    scores = attribution.attribute(Numbered(), Numbered(2), trainer=quiet())
    assert any("averaged weights (EMAWeightAveraging)" in n for n in scores.provenance["notes"])


def test_an_exception_in_validation_leaves_no_averaged_weights(tmp_path: Path) -> None:
    module = Small(sgd)
    net = copy.deepcopy(module.net)
    recorder = TrajectoryRecorder(tmp_path, every_n_steps=3)
    fitting = trainer(EMAWeightAveraging(decay=0.5), Fails(), recorder, val_check_interval=2)
    with pytest.raises(ZeroDivisionError):
        fitting.fit(module, loader(), loader())
    trajectory = open_trajectory(tmp_path)
    assert list(trajectory.checkpoints) == [0, 3]
    require_agreement(trajectory, train(net, epochs(), sgd(net), max_steps=3))


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("every", [1, 100])
def test_stochastic_weight_averaging(batch_norm: bool, every: int, tmp_path: Path) -> None:
    module = Small(sgd)
    if not batch_norm:
        module.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    net = copy.deepcopy(module.net)
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=2)
    recorder = TrajectoryRecorder(tmp_path, every_n_steps=every)
    trainer(averaging, recorder, max_epochs=4).fit(module, loader())
    trajectory = open_trajectory(tmp_path)
    # The rates are the averaging's own; every other thing is a plain loop at these rates.
    rates = trajectory.steps.learning_rate[:, 0].tolist()
    assert rates[0] == 0.1 and rates[-1] != 0.1
    optimizer = sgd(net)

    def rate_of(epoch: int, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = rates[6 * epoch]

    log = train(net, epochs(4), optimizer, before_epoch=rate_of)
    require_agreement(trajectory, log)
    last = trajectory.checkpoints[24].parameters["net.0.weight"]
    assert not torch.equal(module.net[0].weight, last)
