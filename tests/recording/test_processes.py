"""Training in two processes: recorded as one process would record the same batches."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DistributedSampler, WeightedRandomSampler

from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.recording.checks import require_recordable
from tda_lightning.recording.several_processes import interleaved
from tda_lightning.records.errors import (
    RecordingError,
    TrajectoryExistsError,
    UnsupportedTrainingError,
)
from tda_lightning.records.trajectory import Steps
from tda_lightning.runtime.processes import summed
from tda_lightning.store import open_trajectory
from tda_lightning.store.writer import TrajectoryWriter
from tests.processes import connect, outcomes, results
from tests.runs import Net, Numbered, Stream, adamw, fit, loader, scheduled, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Plain(Net):
    """Nothing that depends on how examples are spread: no batch norm, no dropout."""

    def __init__(self, optimizers: Any = None) -> None:
        super().__init__(optimizers)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


class Unused(Plain):
    """A layer that no loss depends on."""

    def __init__(self, optimizers: Any = None) -> None:
        super().__init__(optimizers)
        self.spare = nn.Linear(2, 2)


def in_order() -> Any:
    """A user's own sampler; Lightning's would shuffle."""
    rank = int(os.environ["LOCAL_RANK"])
    return loader(Numbered(21), sampler=DistributedSampler(range(21), 2, rank, shuffle=False))


def noisy() -> Any:
    return loader(Numbered(21), sampler=WeightedRandomSampler(torch.arange(1.0, 22), 20))


ONLINE = {"curvature": "online", "curvature_every": 1}

# 21 examples: the sampler gives each process 11, one of them a second time.
CASES: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "in order": {"train": lambda: in_order()},
    "accumulation and schedule": {"optimizers": scheduled, "accumulate_grad_batches": 2},
    "adamw, clipped": {"optimizers": adamw, "gradient_clip_val": 0.1},
    "last batch dropped": {"train": lambda: loader(Numbered(21), shuffle=True, drop_last=True)},
    "sampler with repeats": {"train": noisy},
    "worker": {"train": lambda: loader(Numbered(21), shuffle=True, num_workers=1)},
    "unused parameters": {"module": Unused, "strategy": "ddp_find_unused_parameters_true"},
    "every epoch": {"recorder": {"every_n_epochs": 1, "save_optimizer": False}},
    "true Fisher": {"recorder": {"every_n_steps": 2, **ONLINE}},
    "empirical Fisher": {
        "accumulate_grad_batches": 2,
        "recorder": {"every_n_steps": 2, "fisher": "empirical", **ONLINE},
    },
    "stopped by steps": {"max_steps": 5, "max_epochs": -1},
}
SINGLE = ("train", "strategy", "max_epochs")


def shuffled() -> Any:
    return loader(Numbered(21), shuffle=True)


def train(path: Path, options: dict[str, Any], **more: Any) -> Net:
    options = {"strategy": "ddp", "devices": 2, "train": shuffled, "module": Plain, **options}
    seed_everything(7, verbose=False)
    options["module"] = options["module"](options.pop("optimizers", None))
    return fit(path, **{**options, **more})


def run_cases(rank: int, root: Path) -> dict[str, list[list[int]]]:
    return {case: train(root / case, dict(CASES[case])).seen for case in CASES}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: Any) -> tuple[Path, list[dict[str, list[list[int]]]]]:
    """Every case, recorded by two processes; what each process's model was given."""
    root = tmp_path_factory.mktemp("ddp")
    return root, results(run_cases, root)


def in_turn(seen: list[list[list[int]]]) -> list[list[int]]:
    """The batches of all processes: the first of each, the second of each, ..."""
    return [batch for turn in zip(*seen, strict=True) for batch in turn]


class Given:
    """Hands out these batches, some in each epoch."""

    def __init__(self, batches: list[list[int]], per_epoch: int) -> None:
        self.batches, self.per_epoch, self.epoch = batches, per_epoch, 0

    def __iter__(self):
        start = self.epoch * self.per_epoch
        self.epoch += 1
        yield from self.batches[start : start + self.per_epoch]

    def __len__(self) -> int:
        return self.per_epoch


def contents(path: Path) -> dict[str, np.ndarray]:
    """Every dataset of a file by name, but for random states."""
    found = {}
    with h5py.File(path) as file:

        def look(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and not name.startswith("random/"):
                found[name] = item[()]

        file.visititems(look)
    return found


SUMMED_IN_ANOTHER_ORDER = 2e-5  # relative, in float32


def require_equal(found: Path, expected: Path) -> int:
    """Compare two folders dataset by dataset; returns the number of datasets."""
    files = sorted(p.relative_to(expected) for p in expected.rglob("*.h5"))
    assert sorted(p.relative_to(found) for p in found.rglob("*.h5")) == files
    count = 0
    for name in files:
        if name.name == "trajectory.h5":
            continue
        ours, theirs = contents(found / name), contents(expected / name)
        assert ours.keys() == theirs.keys(), name
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype and ours[key].shape == value.shape, key
            if value.dtype.kind == "S":
                assert ours[key].tolist() == value.tolist(), name
                continue
            exact = value.dtype.kind != "f" or key.startswith(("learning", "hyper"))
            tolerance = 0.0 if exact else SUMMED_IN_ANOTHER_ORDER
            least = tolerance / 10
            if name.parent.name == "statistics" and value.dtype.kind == "f":
                tolerance, least = 1e-5, 1e-5 * float(np.abs(value).max())
            np.testing.assert_allclose(
                ours[key], value, rtol=tolerance, atol=least, err_msg=f"{name}/{key}"
            )
            count += 1
    return count


@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_that_of_one_process(case: str, recorded: Any, tmp_path: Path) -> None:
    """The same batches in one process that accumulates over twice as many."""
    root, seen = recorded
    options = {key: value for key, value in CASES[case].items() if key not in SINGLE}
    batches = in_turn([each[case] for each in seen])
    per_epoch = 2 * (2 if case == "last batch dropped" else 3)
    given = Given(batches, per_epoch)
    options["accumulate_grad_batches"] = 2 * options.get("accumulate_grad_batches", 1)
    one = train(
        tmp_path,
        options,
        strategy="auto",
        devices=1,
        train=loader(Numbered(21), 1, batch_sampler=given),
    )
    assert require_equal(root / case, tmp_path) > 20
    assert one.seen == batches
    facts = open_trajectory(root / case).facts
    expected = open_trajectory(tmp_path).facts
    assert facts.parameters == expected.parameters
    assert facts.fingerprint == expected.fingerprint
    assert facts.settings["world_size"] == 2
    assert facts.settings["random"] == "absent: several processes"
    assert open_trajectory(root / case).steps.random == {}
    assert open_trajectory(root / case).checkpoints[0].random


@pytest.mark.parametrize("case", ["true Fisher", "empirical Fisher"])
def test_statistics_are_summed_over_the_processes(case: str, recorded: Any) -> None:
    """That they equal one process's is compared above, file by file."""
    trajectory = open_trajectory(recorded[0] / case)
    steps = trajectory.steps
    assert sorted(trajectory.statistics) == [(i, i + 2) for i in range(0, len(steps), 2)]
    for start, stop in trajectory.statistics:
        rows = range(start, stop)
        count = sum(len(batch) for row in rows for batch in steps.batches(row))
        for block in trajectory.statistics[start, stop].values():
            assert float(block.examples) == count > 0
            assert float(block.trace) > 0


def test_examples_that_the_sampler_repeats_are_recorded_as_often(recorded: Any) -> None:
    root, seen = recorded
    steps = open_trajectory(root / "in order").steps
    given = in_turn([each["in order"] for each in seen])
    # Rank 0 has 0, 2, ...; rank 1 has 1, 3, ..., 19 and example 0 once more.
    assert given[:2] == [[0, 2, 4, 6], [1, 3, 5, 7]] and given[5] == [17, 19, 0]
    assert [b.tolist() for row in range(len(steps)) for b in steps.batches(row)] == given
    assert torch.bincount(steps.examples).tolist() == [4] + [2] * 20
    assert steps.accumulation.tolist() == [2] * 6


class Undecided(TrajectoryRecorder):
    """Each process would keep other checkpoints."""

    def should_record(self, step: int) -> bool:
        from torch import distributed

        return step % (2 + distributed.get_rank()) == 0


def record_undecided(rank: int, path: Path) -> None:
    torch.manual_seed(0)
    trainer(Undecided(path), strategy="ddp", devices=2).fit(Plain(), loader(Numbered(21)))


def test_the_first_process_decides_when_to_record(tmp_path: Path) -> None:
    results(record_undecided, tmp_path)
    assert sorted(open_trajectory(tmp_path).checkpoints) == [0, 2, 4, 6]


def test_a_taken_folder_is_refused_in_every_process(tmp_path: Path) -> None:
    fit(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.h5")}
    for outcome in outcomes(lambda rank: train(tmp_path, {})):
        assert isinstance(outcome.error, TrajectoryExistsError), outcome.trace
        assert "overwrite=True" in str(outcome.error)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.h5")} == before
    results(lambda rank: train(tmp_path, {"recorder": {"overwrite": True}}) and None)
    assert open_trajectory(tmp_path).facts.settings["world_size"] == 2


def fail_to_write(rank: int, path: Path) -> None:
    def full(self: Any, checkpoint: Any) -> None:
        raise OSError(28, "No space left on device", str(self.root))

    if rank == 0:
        TrajectoryWriter.write_checkpoint = full  # type: ignore[method-assign]
    train(path, {})


def test_an_error_of_the_writer_is_raised_in_every_process(tmp_path: Path) -> None:
    for outcome in outcomes(fail_to_write, tmp_path):
        assert isinstance(outcome.error, RecordingError), outcome.trace
        assert "No space left on device" in str(outcome.error)


def test_training_goes_on_in_every_process_where_that_is_wanted(tmp_path: Path) -> None:
    def go_on(rank: int) -> int:
        def full(self: Any, checkpoint: Any) -> None:
            raise OSError(28, "No space left on device", str(self.root))

        if rank == 0:
            TrajectoryWriter.write_checkpoint = full  # type: ignore[method-assign]
        module = train(tmp_path, {"recorder": {"on_error": "warn", "every_n_steps": 2}})
        return module.trainer.global_step

    assert results(go_on) == [6, 6]
    assert sorted(open_trajectory(tmp_path).checkpoints) == [0]


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_a_resumed_training_is_recorded_as_one_that_was_not_interrupted(
    fisher: str, tmp_path: Path
) -> None:
    """Step 3 is in no trajectory file when training is interrupted, only in Lightning's."""
    # Of the interval (2, 4] the statistics of step 3 are in no file yet, only in Lightning's.
    recording = {"every_n_steps": 2, "fisher": fisher, **ONLINE}
    options: dict[str, Any] = {"optimizers": adamw, "recorder": recording}

    def interrupted(rank: int) -> None:
        saves = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", save_top_k=-1)
        Fails.ranks = (1,)
        options.update(module=Fails, enable_checkpointing=True)
        train(tmp_path / "run", options, callbacks=(saves,))

    def resumed(rank: int) -> None:
        seed_everything(7, verbose=False)
        recorder = TrajectoryRecorder(tmp_path / "run", **options["recorder"])
        resuming = trainer(recorder, strategy="ddp", devices=2)
        resuming.fit(Plain(adamw), shuffled(), ckpt_path=tmp_path / "ckpt" / "step=3.ckpt")

    found = outcomes(interrupted)
    assert isinstance(found[1].error, ArithmeticError) and found[0].error, found[0].trace
    assert sorted(open_trajectory(tmp_path / "run").checkpoints) == [0, 2]
    results(resumed)
    results(lambda rank: train(tmp_path / "whole", options) and None)
    assert require_equal(tmp_path / "run", tmp_path / "whole") > 20


class Fails(Plain):
    """Training fails in one process, or in all, in step 4 of 6."""

    ranks: tuple[int, ...] = (1,)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3 and self.global_rank in self.ranks:
            raise ArithmeticError("this process is no more")
        return super().training_step(batch, batch_idx)


def fail_in(rank: int, ranks: tuple[int, ...], path: Path) -> None:
    Fails.ranks = ranks
    train(path, {"module": Fails, "recorder": {"every_n_steps": 2}})


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_process_that_fails_leaves_the_last_checkpoint(ranks: Any, tmp_path: Path) -> None:
    found = outcomes(fail_in, ranks, tmp_path)
    for rank, outcome in enumerate(found):
        assert outcome.error is not None, outcome.trace  # the other loses its peer
        assert isinstance(outcome.error, ArithmeticError) == (rank in ranks)
    trajectory = open_trajectory(tmp_path)
    assert sorted(trajectory.checkpoints) == [0, 2]
    assert len(trajectory.steps) == 2


def watch(rank: int, path: Path) -> list[str]:
    """What this process does with files below ``path``."""
    touched: list[str] = []

    def hear(event: str, args: Any) -> None:
        if event.startswith(("open", "os.", "shutil.")):
            touched.extend(f"{event} {a}" for a in args if str(path) in str(a))

    original = h5py.File.__init__

    def opened(self: Any, name: Any, *args: Any, **options: Any) -> None:
        touched.append(f"h5py {name}")
        original(self, name, *args, **options)

    h5py.File.__init__ = opened  # type: ignore[method-assign]
    sys.addaudithook(hear)
    train(path, {"accumulate_grad_batches": 2})
    return touched


def test_only_the_first_process_touches_the_folder(tmp_path: Path) -> None:
    first, second = results(watch, tmp_path / "run")
    assert any("h5py" in event for event in first) and any("os.rename" in e for e in first)
    assert second == []


def test_early_stopping(tmp_path: Path) -> None:
    class Worse(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("worse", float(self.current_epoch), sync_dist=True)

    def stop(rank: int) -> int:
        module = train(
            tmp_path,
            {"module": Worse},
            validation=loader(Numbered(8)),
            callbacks=(EarlyStopping("worse", patience=1),),
            max_epochs=9,
        )
        return module.trainer.global_step

    steps = results(stop)
    assert steps == [6, 6]
    assert open_trajectory(tmp_path).last_step == 6


def test_rates_that_differ_between_processes_are_an_error(tmp_path: Path) -> None:
    def drifting(module: Any) -> Any:
        rate = 0.1 if module.global_rank == 0 or module.global_step else 0.2
        return torch.optim.SGD(module.parameters(), rate)

    for outcome in outcomes(lambda rank: train(tmp_path, {"optimizers": drifting})):
        assert isinstance(outcome.error, UnsupportedTrainingError), outcome.trace
        assert "sync_dist=True" in str(outcome.error)


def test_an_iterable_data_set_has_no_indices_in_any_process(tmp_path: Path) -> None:
    options = {"train": lambda: loader(Stream()), "recorder": {"every_n_steps": 4}}
    results(lambda rank: train(tmp_path, options) and None)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.facts.settings["indices"].startswith("absent")
    assert len(trajectory.steps.examples) == 0
    assert trajectory.steps.batch_offsets.diff().tolist() == [2] * 12


def test_forked_by_lightning(tmp_path: Path) -> None:
    """As in a notebook: Lightning's own launcher starts the processes of the fit."""

    def notebook(rank: int) -> None:
        for name in ("LOCAL_RANK", "NODE_RANK"):
            del os.environ[name]
        train(tmp_path, {"strategy": "ddp_notebook"})

    results(notebook, count=1)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.last_step == 6 and trajectory.facts.settings["world_size"] == 2
    assert trajectory.steps.accumulation.tolist() == [2] * 6


# What is refused.


def test_strategies_whose_processes_do_not_train_as_one_are_refused() -> None:
    def refused(strategy: Any, world_size: int = 2) -> str:
        with pytest.raises(UnsupportedTrainingError) as error:
            require_recordable(SimpleNamespace(strategy=strategy, world_size=world_size))  # type: ignore[arg-type]
        return str(error.value)

    deepspeed = refused(DeepSpeedStrategy.__new__(DeepSpeedStrategy), 1)
    assert "DeepSpeedStrategy" in deepspeed and "strategy='ddp'" in deepspeed
    assert "model_averaging_period" in refused(DDPStrategy(model_averaging_period=2))
    parallel = ModelParallelStrategy()
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    parallel._device_mesh = mesh  # type: ignore[assignment]
    assert "tensor_parallel_size" in refused(parallel)
    assert "torch.distributed" in refused(SimpleNamespace())


# The pieces.


def steps_of(batches: list[list[list[int]]], losses: list[float], accumulation: int = 2) -> Steps:
    """Rows of the given batches."""
    flat = [batch for row in batches for batch in row]
    return Steps(
        epoch=torch.zeros(len(batches), dtype=torch.int64),
        learning_rate=torch.full((len(batches), 1), 0.1, dtype=torch.float64),
        hyperparameters={},
        loss=torch.tensor(losses, dtype=torch.float64),
        gradient_norm=torch.full((len(batches),), 3.0, dtype=torch.float64),
        batch_offsets=torch.tensor([0, *np.cumsum([len(row) for row in batches])]),
        example_offsets=torch.tensor([0, *np.cumsum([len(batch) for batch in flat])]),
        examples=torch.tensor([index for batch in flat for index in batch], dtype=torch.int64),
        accumulation=torch.full((len(batches),), accumulation),
    )


def test_interleaved_rows() -> None:
    first = steps_of([[[1, 2], [3]], [[4]]], [1.0, 2.0])
    second = steps_of([[[5], [6, 7]], [[8, 9]]], [3.0, 6.0])
    joined = interleaved([first, second])
    rows = [[b.tolist() for b in joined.batches(row)] for row in range(2)]
    assert rows == [[[1, 2], [5], [3], [6, 7]], [[4], [8, 9]]]
    assert joined.loss.tolist() == [2.0, 4.0]
    assert joined.accumulation.tolist() == [4, 4]
    assert joined.gradient_norm.tolist() == [3.0, 3.0]
    # Of the pieces of one gradient, 3 and 3, the norm is that of both together.
    sharded = interleaved([first, second], sharded=True)
    assert sharded.gradient_norm.tolist() == pytest.approx([18**0.5] * 2)


def test_interleaved_rows_of_uneven_processes() -> None:
    """Losses count by batches; a process that had none in a step has no loss there."""
    first = steps_of([[[1], [2]], [[3]]], [1.0, 2.0])
    second = steps_of([[[4]], []], [4.0, float("nan")])
    joined = interleaved([first, second])
    assert [b.tolist() for b in joined.batches(0)] == [[1], [4], [2]]
    assert joined.loss.tolist() == [2.0, 2.0]
    with pytest.raises(UnsupportedTrainingError, match="took 1 optimizer steps, process 0 2"):
        interleaved([first, steps_of([[[4]]], [4.0])])
    without = steps_of([[[]], [[]]], [4.0, 4.0])
    with pytest.raises(UnsupportedTrainingError, match="example indices"):
        interleaved([first, without])


def sum_up(rank: int) -> dict[str, Any]:
    connect(rank)
    mine = {"b": torch.full((2, 3), rank + 1.0), "a": torch.tensor(rank + 1)}
    if rank:
        mine = dict(reversed(mine.items()))  # the order of names does not matter
    return summed(mine) | {"own": mine["b"]}


def test_summed() -> None:
    for rank, found in enumerate(results(sum_up)):
        assert torch.equal(found["b"], torch.full((2, 3), 3.0)) and found["a"].item() == 3
        assert torch.equal(found["own"], torch.full((2, 3), rank + 1.0))
    alone = {"a": torch.ones(2)}
    assert torch.equal(summed(alone)["a"], alone["a"])


def test_tensors_that_differ_are_not_summed() -> None:
    def work(rank: int) -> None:
        connect(rank)
        summed({"same": torch.ones(2), ("mine", "yours")[rank]: torch.ones(1)})

    for outcome in outcomes(work):
        assert isinstance(outcome.error, ValueError), outcome.trace
        assert "mine, yours" in str(outcome.error)


def test_layout_and_facts_are_plain(recorded: Any) -> None:
    """Only the first process's random states are kept, under the usual names."""
    root, _ = recorded
    with h5py.File(next((root / "shuffled" / "checkpoints").iterdir())) as file:
        assert {"torch", "python", "numpy"} <= set(file["random"])
    with h5py.File(root / "shuffled" / "trajectory.h5") as file:
        facts = json.loads(file["facts"][0])
    assert facts["settings"]["strategy"] == "DDPStrategy"
