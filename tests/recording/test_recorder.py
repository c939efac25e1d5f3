"""The recorder against what the training really did."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler

from tda_lightning.optimizers import known_optimizers, rule_of
from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.errors import TrajectoryExistsError, UnsupportedTrainingError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.store import open_trajectory
from tests.runs import Net, Numbered, Stream, adamw, fit, loader, scheduled, sgd, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def batches(trajectory: Trajectory) -> list[list[int]]:
    """Recorded example indices of every batch in order."""
    rows = range(len(trajectory.steps))
    return [batch.tolist() for row in rows for batch in trajectory.steps.batches(row)]


class Shuffled:
    """A custom batch sampler: no base class, uneven batches, one list used over and over.

    (A list for each batch with workers: there the loader itself would see later contents.)
    """

    def __init__(self, size: int, known_length: bool = True, reuse: bool = True) -> None:
        self.size, self.reuse = size, reuse
        if known_length:
            self.__class__ = type("Sized", (Shuffled,), {"__len__": lambda _: 6})

    def __iter__(self):
        order, batch = torch.randperm(self.size).tolist(), []
        for bound in (2, 3, 4, 5, 6, 2):
            batch[:] = [order.pop() for _ in range(bound)]
            yield batch if self.reuse else list(batch)


class Reloading(LightningDataModule):
    """Builds its loader anew each time."""

    def train_dataloader(self):
        return loader(shuffle=True, num_workers=1)


class Peeks(Callback):
    """A user who looks at the training data through iterators of their own."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        next(iter(trainer.train_dataloader))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        list(trainer.train_dataloader)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        next(iter(trainer.train_dataloader))


SHARED = loader(shuffle=True)
INDEX_CASES: dict[str, dict[str, Any]] = {
    "in order": {"train": loader()},
    "shuffled": {"train": loader(shuffle=True)},
    "short last batch dropped": {"train": loader(shuffle=True, drop_last=True)},
    "workers": {"train": loader(shuffle=True, num_workers=2), "max_epochs": 3},
    "persistent workers": {
        "train": loader(shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=4),
        "max_epochs": 3,
    },
    "weighted sampler with repeats": {
        "train": loader(sampler=WeightedRandomSampler(torch.rand(22).tolist(), 30))
    },
    "custom batch sampler": {
        "train": loader(batch_size=1, batch_sampler=Shuffled(22)),
        "max_epochs": 3,
    },
    "custom batch sampler in a worker": {
        "train": loader(batch_size=1, batch_sampler=Shuffled(22, reuse=False), num_workers=1),
        "max_epochs": 3,
    },
    "batch sampler of unknown length": {
        "train": loader(batch_size=1, batch_sampler=Shuffled(22, known_length=False)),
        "recorder": {"every_n_steps": 4},
        "max_epochs": 3,
    },
    "samples without batching": {
        "train": loader(batch_size=None, shuffle=True),
        "module": lambda: NoNorm(),
    },
    "batches drawn by the sampler": {
        "train": loader(Numbered(), None, sampler=BatchSampler(RandomSampler(range(22)), 4, False)),
    },
    "accumulation": {"train": loader(shuffle=True), "accumulate_grad_batches": 4},
    "accumulation over workers": {
        "train": loader(shuffle=True, num_workers=2),
        "accumulate_grad_batches": 5,
        "max_epochs": 3,
    },
    "validation in mid-epoch": {
        "train": loader(shuffle=True),
        "validation": loader(shuffle=True),
        "val_check_interval": 2,
    },
    "one loader for training and validation": {
        "train": SHARED,
        "validation": SHARED,
        "val_check_interval": 2,
    },
    "reloaded": {
        "train": Reloading(),
        "reload_dataloaders_every_n_epochs": 1,
        "max_epochs": 3,
    },
    "limited": {"train": loader(shuffle=True, num_workers=2), "limit_train_batches": 3},
    "stopped by steps": {"train": loader(shuffle=True), "max_steps": 8, "max_epochs": -1},
    "overfitting": {"train": loader(shuffle=True), "overfit_batches": 2},
    "somebody looks at the data": {
        "train": loader(shuffle=True),
        "callbacks": (Peeks(),),
        "max_epochs": 3,
    },
}


class NoNorm(Net):
    """Batch norm needs more than one example."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 1))


@pytest.mark.parametrize("case", INDEX_CASES)
def test_indices_are_those_that_the_model_was_given(case: str, tmp_path: Path) -> None:
    options = dict(INDEX_CASES[case])
    if "module" in options:
        options["module"] = options["module"]()
    train = options.get("train")
    module = fit(tmp_path, **options)
    trajectory = open_trajectory(tmp_path)
    assert batches(trajectory) == module.seen
    assert len(module.seen) > 3
    assert trajectory.facts.num_examples == 22
    assert trajectory.facts.settings["indices"] == "recorded"
    if not isinstance(train, Reloading):
        assert not any("Recorded" in type(s).__name__ for s in (train.batch_sampler, train.sampler))


def test_accumulated_batches_make_one_step(tmp_path: Path) -> None:
    module = fit(tmp_path, accumulate_grad_batches=4)
    steps = open_trajectory(tmp_path).steps
    # 6 batches an epoch: four, then the two that are left.
    assert [len(steps.batches(row)) for row in range(len(steps))] == [4, 2, 4, 2]
    assert steps.accumulation.tolist() == [4, 4, 4, 4]
    expected = [np.mean(module.losses[a:b]) for a, b in ((0, 4), (4, 6), (6, 10), (10, 12))]
    assert steps.loss.tolist() == pytest.approx(expected, rel=1e-6)


def test_skipped_batches_belong_to_no_step(tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    module = fit(tmp_path, module=Skips(), accumulate_grad_batches=3, max_epochs=1)
    steps = open_trajectory(tmp_path).steps
    assert [b.tolist() for b in steps.batches(0)] == [module.seen[0], module.seen[2]]
    assert [b.tolist() for b in steps.batches(1)] == module.seen[3:]
    assert steps.loss[0].item() == pytest.approx((module.losses[0] + module.losses[2]) / 2)


def test_batches_of_nothing_do_not_shift_the_indices(tmp_path: Path) -> None:
    def collate(examples: list[Any]) -> Any:
        skipped = any(index == 7 for *_, index in examples)
        return None if skipped else torch.utils.data.default_collate(examples)

    module = fit(tmp_path, loader(shuffle=True, collate_fn=collate))
    recorded = batches(open_trajectory(tmp_path))
    assert recorded == module.seen
    assert not any(7 in batch for batch in recorded)


def test_steps_table_equals_a_plain_log(tmp_path: Path) -> None:
    module = fit(tmp_path, optimizers=scheduled, gradient_clip_val=0.1)
    trajectory = open_trajectory(tmp_path)
    steps = trajectory.steps
    assert steps.epoch.tolist() == [0] * 6 + [1] * 6
    # Rates of a plain loop: the scheduler moves after each step, the groups keep their ratio.
    plain = [0.05 * 0.9**t for t in range(12)]
    assert steps.learning_rate[:, 0].tolist() == plain == module.rates
    assert steps.learning_rate[:, 1].tolist() == [0.02 * 0.9**t for t in range(12)]
    assert steps.hyperparameters.keys() == {"momentum", "dampening", "nesterov", "weight_decay"}
    assert steps.hyperparameters["nesterov"].tolist() == [[1.0, 1.0]] * 12
    assert steps.hyperparameters["weight_decay"].tolist() == [[0.01, 0.0]] * 12
    assert steps.loss.tolist() == module.losses
    # Before clipping: norms above the clipping value remain.
    assert steps.gradient_norm.tolist() == pytest.approx(module.norms, rel=1e-6)
    assert max(module.norms) > 0.1
    assert trajectory.facts.settings["gradient_clip_val"] == 0.1
    groups = {name: fact.group for name, fact in trajectory.facts.parameters.items()}
    assert groups["net.0.weight"] == 0
    assert groups["net.0.bias"] == 1


class Snapshots(Callback):
    """Keeps every step's weights, buffers and optimizer state in memory."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}
        self.momenta: dict[int, list[torch.Tensor]] = {}

    def _keep(self, trainer: Any, module: Any) -> None:
        self.states[trainer.global_step] = {k: v.clone() for k, v in module.state_dict().items()}
        state = trainer.optimizers[0].state
        self.momenta[trainer.global_step] = [
            state[p]["momentum_buffer"].clone() for p in module.parameters() if state.get(p)
        ]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._keep(trainer, pl_module)


def test_checkpoints_hold_the_state_of_their_step(tmp_path: Path) -> None:
    snapshots = Snapshots()
    module = Net()
    module.head = nn.Linear(2, 2).requires_grad_(False)
    fit(tmp_path, module=module, callbacks=(snapshots,), recorder={"num_checkpoints": 5})
    trajectory = open_trajectory(tmp_path)
    # floor(i 12 / 5)
    assert list(trajectory.checkpoints) == [0, 2, 4, 7, 9, 12]
    assert "head.weight" not in trajectory.facts.parameters
    for step, checkpoint in trajectory.checkpoints.items():
        everything = {**checkpoint.parameters, **checkpoint.buffers}
        assert everything.keys() == snapshots.states[step].keys()
        for name, tensor in snapshots.states[step].items():
            assert torch.equal(everything[name], tensor)
        momenta = [state["momentum_buffer"] for state in checkpoint.optimizer.values() if state]
        assert all(map(torch.equal, momenta, snapshots.momenta[step]))
        assert len(momenta) == (len(trajectory.facts.parameters) if step else 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_checkpoints": 100}, list(range(13))),
        ({"every_n_steps": 5}, [0, 5, 10, 12]),
        ({"every_n_epochs": 1}, [0, 6, 12]),
        ({"every_n_steps": 4, "every_n_epochs": 1}, [0, 4, 6, 8, 12]),
    ],
)
def test_schedule(options: dict[str, int], expected: list[int], tmp_path: Path) -> None:
    fit(tmp_path, recorder=options)
    trajectory = open_trajectory(tmp_path)
    assert list(trajectory.checkpoints) == expected
    assert trajectory.num_steps == 12


def test_when_to_record_can_be_overridden(tmp_path: Path) -> None:
    class Primes(TrajectoryRecorder):
        def should_record(self, step: int) -> bool:
            return step in (2, 3, 5, 7, 11)

    trainer(Primes(tmp_path)).fit(Net(), loader())
    assert list(open_trajectory(tmp_path).checkpoints) == [0, 2, 3, 5, 7, 11, 12]


def test_optimizer_state_can_be_thinned(tmp_path: Path) -> None:
    kept = {}
    for choice in (True, False, 2):
        fit(tmp_path / str(choice), recorder={"num_checkpoints": 3, "save_optimizer": choice})
        checkpoints = open_trajectory(tmp_path / str(choice)).checkpoints
        kept[choice] = [s for s, c in checkpoints.items() if c.optimizer is not None]
    assert kept == {True: [0, 4, 8, 12], False: [], 2: [0, 8, 12]}


def test_last_step_is_kept_when_training_stops_early(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 5

    fit(tmp_path, callbacks=(Stops(),), recorder={"num_checkpoints": 3})
    trajectory = open_trajectory(tmp_path)
    assert list(trajectory.checkpoints) == [0, 4, 5]
    assert trajectory.num_steps == 5


def test_two_recorders_record_alike(tmp_path: Path) -> None:
    module = fit(tmp_path / "a", callbacks=(TrajectoryRecorder(tmp_path / "b"),))
    assert batches(open_trajectory(tmp_path / "a")) == module.seen
    assert batches(open_trajectory(tmp_path / "b")) == module.seen


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
def test_a_failing_run_keeps_what_was_whole(hook: str, tmp_path: Path) -> None:
    def fail(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            raise ZeroDivisionError("as planned")

    train = loader(shuffle=True)
    sampler = train.batch_sampler
    fails = type("Fails", (Callback,), {hook: staticmethod(fail)})
    with pytest.raises(ZeroDivisionError, match="as planned"):
        fit(tmp_path, train, callbacks=(fails(),), recorder={"num_checkpoints": 3})
    # Batch norm counts a forward pass that no step followed: nothing is written past step 4.
    assert list(open_trajectory(tmp_path).checkpoints) == [0, 4]
    assert open_trajectory(tmp_path).num_steps == 4
    assert train.batch_sampler is sampler


@pytest.mark.parametrize("optimizers", [sgd, adamw])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_the_same_bit_for_bit(optimizers: Any, workers: int, tmp_path: Path) -> None:
    def train() -> Any:
        dataset = Numbered(augment=True)
        dataset.own = torch.Generator().manual_seed(3)  # drawn from by the fingerprint too
        read = dataset.__class__.__getitem__
        dataset.__class__ = type(
            "Own",
            (Numbered,),
            {
                "__getitem__": lambda self, i: (
                    read(self, i)[0] + torch.rand(3, generator=self.own),
                    *read(self, i)[1:],
                )
            },
        )
        return loader(dataset, shuffle=True, num_workers=workers)

    outcomes = []
    for path in (None, tmp_path):
        module = fit(
            path,
            train,
            optimizers=optimizers,
            validation=loader(Numbered(seed=1), shuffle=True),
            val_check_interval=3,
            recorder={"every_n_steps": 1},
        )
        state = [t.clone() for t in module.state_dict().values()]
        numbers = (torch.rand(1), random.random(), np.random.random())  # noqa: NPY002
        outcomes.append((state, module.losses, numbers))
    (plain, losses, numbers), (recorded, recorded_losses, recorded_numbers) = outcomes
    assert all(map(torch.equal, plain, recorded))
    assert losses == recorded_losses
    assert numbers == recorded_numbers
    # Augmented examples differ whenever they are read: none is in the fingerprint.
    assert open_trajectory(tmp_path).facts.fingerprint == {"length": "22"}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (sgd, "SGD"),
        (adamw, "AdamW"),
        (lambda m: torch.optim.Adam(m.parameters()), "Adam"),
        (lambda m: torch.optim.Adam(m.parameters(), amsgrad=True), "Adam(amsgrad=True)"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True), "SGD(maximize=True)"),
        (lambda m: torch.optim.RMSprop(m.parameters()), "RMSprop"),
        (lambda m: torch.optim.NAdam(m.parameters()), "NAdam"),
        (lambda m: type("SGD", (torch.optim.SGD,), {})(m.parameters()), "SGD"),
        (
            lambda m: type("SGD", (torch.optim.SGD,), {"step": _own_step})(m.parameters()),
            "tests.recording.test_recorder.SGD",
        ),
    ],
)
def test_only_an_optimizer_with_a_formula_gets_its_name(
    make: Any, name: str, tmp_path: Path
) -> None:
    known = name in known_optimizers()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(TrajectoryRecorder(tmp_path), max_steps=2).fit(Net(make), loader())
    said = [str(w.message) for w in caught if "no formula" in str(w.message)]
    assert [f"There is no formula for {name}" in text for text in said] == [True] * (not known)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.facts.optimizer == name
    if known:
        assert rule_of(trajectory).name == name
    else:
        assert "TracIn" in said[0] and ("refuse it too" in said[0]) == ("maximize" in name)
        with pytest.raises(UnsupportedTrainingError, match=r"no formula.*SGD, Adam, AdamW"):
            rule_of(trajectory)


def _own_step(self: Any, closure: Any = None) -> Any:
    return torch.optim.SGD.step(self, closure)


def test_adam_records_what_its_formula_needs(tmp_path: Path) -> None:
    fit(tmp_path, optimizers=adamw, max_steps=2)
    trajectory = open_trajectory(tmp_path)
    hyper = {name: values[0, 0].item() for name, values in trajectory.steps.hyperparameters.items()}
    assert hyper == {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    state = trajectory.checkpoints[2].optimizer["net.0.weight"]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"].item() == 2


def test_tied_weights_are_recorded_once(tmp_path: Path) -> None:
    module = Net()
    module.again = module.net[0]
    fit(tmp_path, module=module, max_steps=1)
    assert set(open_trajectory(tmp_path).facts.parameters) == {
        f"net.{layer}.{name}" for layer in (0, 1, 4) for name in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (lambda: loader(Stream()), "the training data set is an IterableDataset"),
        (lambda: Batches(), "the training loader is a Batches, not a DataLoader"),
        (lambda: loader(Keyed(), sampler="abc" * 4), "hands out keys such as"),
    ],
)
def test_missing_indices_are_said(train: Any, reason: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"no example indices: .*{reason}"):
        trainer(TrajectoryRecorder(tmp_path, every_n_steps=3)).fit(Net(), train())
    trajectory = open_trajectory(tmp_path)
    assert reason in trajectory.facts.settings["indices"]
    assert len(trajectory.steps) > 5
    assert len(trajectory.steps.examples) == 0
    assert not any(batches(trajectory)[0])


class Batches:
    """A loader that is no DataLoader."""

    def __iter__(self):
        yield from loader()


class Keyed(dict):
    """A data set read by keys."""

    def __init__(self) -> None:
        super().__init__({key: Numbered()[i] for i, key in enumerate("abc")})


def test_a_nan_loss_is_recorded_and_named(tmp_path: Path) -> None:
    class Bad(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * (float("nan") if batch_idx == 3 else 1)

    with pytest.warns(UserWarning, match="training loss of step 4 is nan"):
        trainer(TrajectoryRecorder(tmp_path)).fit(Bad(), loader())
    steps = open_trajectory(tmp_path).steps
    assert len(steps) == 12
    assert steps.loss.isnan().nonzero()[0].item() == 3


# Bad input: an error that says what to do, and nothing is written or overwritten.


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Fetches(Net):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        raise AssertionError("must not be reached")


class Unknown(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1)


class Two(Net):
    def configure_optimizers(self) -> Any:
        return [sgd(self), adamw(self)]


@pytest.mark.parametrize(
    ("module", "train", "options", "message"),
    [
        (Manual, loader, {}, "manual optimization"),
        (Fetches, loader, {}, "dataloader_iter"),
        (Unknown, loader, {}, "1 parameters that are not among the module's"),
        (Net, lambda: [loader(), loader()], {}, "collection of 2 loaders"),
        (Net, lambda: CombinedLoader({"a": loader()}, "min_size"), {}, "single DataLoader"),
        (Net, lambda: loader(num_workers=1, in_order=False), {}, "in_order=False"),
        (Net, loader, {"max_epochs": -1}, "Pass every_n_steps or every_n_epochs"),
    ],
)
def test_unsupported_training_is_refused_before_it_starts(
    module: Any, train: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    target, net = tmp_path / "run", module()
    with pytest.raises((UnsupportedTrainingError, ValueError), match=message):
        trainer(TrajectoryRecorder(target), **options).fit(net, train())
    assert net.seen == []
    assert not target.exists()


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    class Alternates(Two):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    # Lightning itself refuses several optimizers with automatic optimization.
    with pytest.raises(UnsupportedTrainingError, match="manual optimization"):
        trainer(TrajectoryRecorder(tmp_path / "run")).fit(Alternates(), loader())
    with pytest.raises((UnsupportedTrainingError, RuntimeError), match="optimizers"):
        trainer(TrajectoryRecorder(tmp_path / "run")).fit(Two(), loader())
    assert not (tmp_path / "run").exists()


def test_training_that_has_begun_is_refused(tmp_path: Path) -> None:
    again = trainer(max_epochs=1)
    again.fit(Net(), loader())
    again.fit_loop.max_epochs = 2
    again.callbacks.append(TrajectoryRecorder(tmp_path / "run"))
    with pytest.raises(UnsupportedTrainingError, match="starts at step 6"):
        again.fit(Net(), loader())
    assert not (tmp_path / "run").exists()


def test_an_existing_trajectory_is_kept_unless_asked(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=3)
    (tmp_path / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    net = Net()
    with pytest.raises(TrajectoryExistsError, match=r"already holds a trajectory.*overwrite=True"):
        fit(tmp_path, module=net)
    assert net.seen == []
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    # A run that is refused for another reason does not touch it either.
    with pytest.raises(UnsupportedTrainingError):
        fit(tmp_path, [loader(), loader()], recorder={"overwrite": True})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    fit(tmp_path, recorder={"overwrite": True, "num_checkpoints": 2})
    assert list(open_trajectory(tmp_path).checkpoints) == [0, 6, 12]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(TrajectoryExistsError, match="is a file, expected a folder"):
        fit(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_dry_run_records_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fast_dev_run"):
        trainer(TrajectoryRecorder(tmp_path / "run"), fast_dev_run=2).fit(Net(), loader())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["num_checkpoints", "every_n_steps", "every_n_epochs"])
def test_counts_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TrajectoryRecorder("runs/none", **{name: 0})  # type: ignore[arg-type]
