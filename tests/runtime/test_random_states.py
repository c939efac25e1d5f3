"""Recorded random states: enough to repeat a run bit for bit, and no more than that takes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import default_collate

from tda_lightning.records.trajectory import Steps, Trajectory
from tda_lightning.runtime.random_states import (
    Snapshot,
    current_states,
    require_restorable,
    restore_states,
    unchanged_randomness,
)
from tda_lightning.store import open_trajectory
from tda_lightning.store.inspect import describe
from tda_lightning.store.step_arrays import as_tensors
from tda_lightning.store.steps_file import join_steps, read_steps, write_steps
from tests.resumable import EpochOrder, Resumable, ResumableLoader, differences, train
from tests.runs import Net, Numbered, adamw, fit, loader, sgd

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with unchanged_randomness():
        yield


# Replaying


def replay(run: Trajectory, start: int, data: Any, module: Net, device: str = "cpu") -> None:
    """Train on from checkpoint ``start`` in torch alone, and compare with all that follows."""
    first, steps = run.checkpoints[start], run.steps
    module.train().to(device).load_state_dict({**first.parameters, **first.buffers})
    named = dict(module.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(name in run.facts.parameters)
    optimizer = module.optimizers_of(module)
    assert first.optimizer is not None
    for name, state in first.optimizer.items():
        if state:
            optimizer.state[named[name]] = {k: v.to(device).clone() for k, v in state.items()}
    assert first.random is not None
    restore_states(first.random)
    for row in range(start, len(steps)):
        position, losses = int(steps.batch_offsets[row]), []
        for batch in steps.batches(row):
            if position in steps.random:
                restore_states(steps.random[position])
            examples = [p.to(device) for p in default_collate([data[i] for i in batch.tolist()])]
            loss = module.training_step(module.on_after_batch_transfer(examples, 0), 0)
            (loss / int(steps.accumulation[row])).backward()
            losses.append(loss.item())
            position += 1
        optimizer.step()
        optimizer.zero_grad()
        assert sum(losses) / len(losses) == float(steps.loss[row]), row
        if row + 1 in run.checkpoints:
            require_same(run, row + 1, module, optimizer)


def require_same(run: Trajectory, step: int, module: nn.Module, optimizer: Any) -> None:
    expected, named = run.checkpoints[step], dict(module.named_parameters())
    tensors = {**expected.parameters, **expected.buffers}
    assert tensors.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.cpu(), tensors[name]), (step, name)
    for name, state in (expected.optimizer or {}).items():
        for key, value in state.items():
            assert torch.equal(optimizer.state[named[name]][key].cpu(), value), (step, name, key)
    assert expected.random is not None
    require_alike(current_states(), expected.random)


def require_alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def require_repeatable(path: Path, data: Any, make: Any = Net, device: str = "cpu") -> Trajectory:
    """Every recorded checkpoint leads to the ones after it."""
    whole = open_trajectory(path)
    assert whole.facts.settings["random"] == "recorded"
    assert 0 in whole.steps.random
    for run in whole.stages():
        starts = list(run.checkpoints)
        assert len(starts) > 2
        for start in starts[:-1]:
            replay(run, start, data, make(), device)
    return whole


class Draws(Callback):
    """Draws from one generator or another in a hook of its own."""

    def __init__(self, hook: str) -> None:
        self.count = 0
        setattr(self, hook, self._draw)

    def _draw(self, *_: Any) -> None:
        self.count += 1
        turn, rest = divmod(self.count, 4)
        if rest == 0:
            DRAWS[turn % len(DRAWS)]()


DRAWS: list[Callable[[], Any]] = [
    lambda: torch.rand(1),
    lambda: random.random(),
    lambda: random.gauss(0, 1),
    lambda: np.random.random(),  # noqa: NPY002
    lambda: np.random.randn(),  # noqa: NPY002
]


AUGMENTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "Adam": {"optimizers": adamw},
    "accumulation": {"accumulate_grad_batches": 2},
    "epochs": {"recorder": {"every_n_epochs": 1}},
    "a callback at the end of a batch": {"callbacks": (Draws("on_train_batch_end"),)},
    "a callback before an epoch": {"callbacks": (Draws("on_train_epoch_start"),)},
}


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("case", AUGMENTED)
def test_a_run_is_repeated_bit_for_bit(case: str, validates: bool, tmp_path: Path) -> None:
    options = {"recorder": {"every_n_steps": 4}, "max_epochs": 3, **AUGMENTED[case]}
    if validates:
        held_out = loader(Numbered(8, seed=1), shuffle=True)
        # In the midst of an epoch, and of an accumulated step.
        options |= {"validation": held_out, "val_check_interval": 3}
    data = Numbered(augment=True)
    fit(tmp_path, lambda: loader(data, shuffle=True), **options)
    made = AUGMENTED[case].get("optimizers", sgd)
    run = require_repeatable(tmp_path, data, lambda: Net(made))
    assert run.facts.settings["loader_workers"] == 0
    assert describe(tmp_path).problems == ()


class Unsized:
    """A batch sampler that draws, and that does not tell how many batches there will be."""

    def __iter__(self):
        order = torch.randperm(22).tolist()
        for first in range(0, 22, 4):
            random.random()
            yield order[first : first + 4]


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_workers_is_repeated(accumulate: int, sized: bool, tmp_path: Path) -> None:
    data = Numbered()

    def make() -> Any:
        if sized:
            return loader(data, shuffle=True, num_workers=2)
        return torch.utils.data.DataLoader(data, batch_sampler=Unsized(), num_workers=2)  # type: ignore[arg-type]

    fit(
        tmp_path,
        make,
        max_epochs=3,
        recorder={"every_n_steps": 2},
        accumulate_grad_batches=accumulate,
        validation=loader(Numbered(8, seed=1), shuffle=True),
        val_check_interval=3 if sized else 1.0,
    )
    run = require_repeatable(tmp_path, data)
    assert run.facts.settings["loader_workers"] == 2


class Noisy(Net):
    """Augments on the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 0.1 * torch.randn_like(batch[0]), *batch[1:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_drawn_for_a_whole_batch_is_repeated(workers: int, tmp_path: Path) -> None:
    fit(
        tmp_path,
        lambda: loader(Numbered(), shuffle=True, num_workers=workers),
        module=Noisy(),
        recorder={"every_n_steps": 4},
        validation=loader(Numbered(8, seed=1)),
        val_check_interval=3,
    )
    run = require_repeatable(tmp_path, Numbered(), Noisy)
    assert list(run.steps.random) == [0, 3, 6, 9]


# Batches that come to nothing


class NoNorm(Net):
    """Batch norm would count the batches that came to nothing, too."""

    def __init__(self) -> None:
        super().__init__(sgd)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass  # there may be no gradient


class Skips(NoNorm):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in (1, 5) else loss


class SkipsSteps(NoNorm):
    """As a gradient scaler does it: Lightning counts a step, and there is none."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if batch_idx == 3:
            closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)


class CutShort(NoNorm):
    """Epochs end in the midst of an accumulated step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 5 else None


def nothing_of_seven(examples: list[Any]) -> Any:
    return None if any(index == 7 for *_, index in examples) else default_collate(examples)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("case", ["loss", "step", "epoch", "batch"])
def test_batches_that_come_to_nothing(case: str, accumulate: int, tmp_path: Path) -> None:
    modules = {"loss": Skips, "step": SkipsSteps, "epoch": CutShort, "batch": NoNorm}
    data = Numbered(augment=True)
    options = {"collate_fn": nothing_of_seven} if case == "batch" else {}
    fit(
        tmp_path,
        lambda: loader(data, shuffle=True, **options),
        module=modules[case](),
        max_epochs=2,
        recorder={"every_n_steps": 1},
        accumulate_grad_batches=accumulate,
    )
    run = require_repeatable(tmp_path, data, NoNorm)
    skipped = run.facts.settings["skipped_steps"]
    assert bool(skipped) == (case == "step" or (case == "loss" and accumulate == 1))


def test_a_stage_begins_with_what_the_step_before_left(tmp_path: Path) -> None:
    """Its first checkpoint is written when its first batch has been fetched already."""

    class Freezes(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].weight.requires_grad_(self.global_step < 5)

    data = Numbered(augment=True)
    options: dict[str, Any] = {"max_epochs": 3, "recorder": {"every_n_steps": 3}}
    fit(tmp_path, lambda: loader(data, shuffle=True), module=Freezes(), **options)
    run = require_repeatable(tmp_path, data)
    assert [stage.start for stage in run.facts.stages] == [0, 5]


# What is recorded, and what is not


def test_only_jumps_are_recorded(tmp_path: Path) -> None:
    data = Numbered(augment=True)
    for name, options in {"plain": {}, "accumulated": {"accumulate_grad_batches": 4}}.items():
        fit(tmp_path / name, lambda: loader(data, shuffle=True), max_epochs=3, **options)
        assert list(open_trajectory(tmp_path / name).steps.random) == [0, 6, 12]
    # Nothing draws between the epochs.
    quiet = {"generator": torch.Generator(), "shuffle": True}
    fit(tmp_path / "quiet", lambda: loader(data, **quiet), max_epochs=3)
    assert list(open_trajectory(tmp_path / "quiet").steps.random) == [0]
    fit(tmp_path / "workers", lambda: loader(num_workers=2, **quiet), max_epochs=3)
    assert list(open_trajectory(tmp_path / "workers").steps.random) == [0]


@pytest.mark.parametrize(
    ("sampler", "reason"),
    [
        (Unsized(), "absent: batches are fetched ahead of their turn"),
        ([["a", "b"], ["c", "d"]], "absent: the training sampler hands out keys such as"),
    ],
)
def test_absent_states_are_said(sampler: Any, reason: str, tmp_path: Path) -> None:
    class Keyed(Numbered):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(index if isinstance(index, int) else ord(index) - 97)

    train = torch.utils.data.DataLoader(Keyed(), batch_sampler=sampler)
    fit(tmp_path, train, recorder={"every_n_steps": 1})
    run = open_trajectory(tmp_path)
    assert run.facts.settings["random"].startswith(reason)
    assert run.steps.random == {}
    assert all(run.checkpoints[step].random for step in run.checkpoints)


# Resuming


class Exact(Resumable):
    """Puts all generators back as they were."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = current_states()

    def on_train_start(self) -> None:
        if self._random is not None:
            restore_states(self._random)  # type: ignore[arg-type]
            self._random = None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_records_what_the_uninterrupted_one_does(
    accumulate: int, tmp_path: Path
) -> None:
    def run(path: Path, **options: Any) -> None:
        own = {"sampler": EpochOrder(22), "generator": torch.Generator(), "batch_size": 4}
        made = ResumableLoader(Numbered(augment=True), **own)
        options |= {"recorder": {"every_n_steps": 5}, "accumulate_grad_batches": accumulate}
        jumping = (Jumping(),)
        train(path, module=Exact(), loader=made, max_epochs=4, last=jumping, **options)

    class Jumping(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step % 3 == 0:
                np.random.randn()  # noqa: NPY002

    run(tmp_path / "whole", kept=tmp_path / "kept", every=1)
    assert len(open_trajectory(tmp_path / "whole").steps.random) > 3
    for step in (1, 3, 4, 5, 7, 10):
        path = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(step)))
        run(path, resume=tmp_path / "kept" / f"{step}.ckpt")
        count, differing = differences(tmp_path / "whole", path)
        assert count > 100
        assert not differing, step


# The states themselves


def numbers() -> list[Any]:
    """Of every kind. Normal numbers come in pairs, so that one of each waits afterwards."""
    numpy = np.random.randn(3).tolist()  # noqa: NPY002
    python = [random.gauss(0, 1) for _ in range(3)] + [random.random()]
    return [*numpy, *python, *torch.randn(3).tolist(), *torch.randn(1, dtype=torch.float64)]


@pytest.mark.parametrize("waiting", [False, True])
def test_states_come_back(waiting: bool) -> None:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    if waiting:
        numbers()
    states = current_states()
    require_restorable(states)
    assert {n: (s.dtype, list(s.shape)) for n, s in states.items()} == {
        "torch": (torch.uint8, [5056]),
        "python": (torch.int64, [627]),
        "numpy": (torch.int64, [627]),
    }
    assert states["python"][625] == states["numpy"][625] == waiting
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    expected = numbers()
    for _ in range(2):
        restore_states(states)
        require_alike(current_states(), states)
        assert random.getstate() == python
        assert str(np.random.get_state()) == str(numpy)  # noqa: NPY002
        assert numbers() == expected
    assert Snapshot.of(states).states().keys() == states.keys()


@pytest.mark.parametrize("draw", DRAWS)
def test_every_draw_is_noticed(draw: Callable[[], Any]) -> None:
    """Three in a row: the second normal number has been drawn with the first."""
    before = Snapshot.take()
    assert before == Snapshot.take() == Snapshot.of(before.states())
    for _ in range(3):
        draw()
        assert Snapshot.take() != before
        before = Snapshot.take()


def test_a_numpy_generator_of_another_kind_is_left_out() -> None:
    twister = np.random.mtrand.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))  # type: ignore[attr-defined]
        states = current_states()
        assert states.keys() == {"torch", "python"}
        require_restorable(states)
        with unchanged_randomness():
            expected = np.random.random()  # noqa: NPY002
        assert np.random.random() == expected  # noqa: NPY002
        restore_states(states)
    finally:
        np.random.set_bit_generator(twister)  # type: ignore[attr-defined]


def test_cuda_has_a_state_once_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [torch.arange(16, dtype=torch.uint8) * 4 + device for device in range(11)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [s.clone() for s in kept])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kept))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, device: kept[device].copy_(s))
    before = Snapshot.take()
    states = current_states()
    assert len(states) == 14
    assert torch.equal(states["cuda10"], kept[10])
    # Files list them by the alphabet.
    assert Snapshot.of(dict(sorted(states.items()))) == before
    kept[10][8] += 4
    assert Snapshot.take() != before
    restore_states(states)
    assert Snapshot.take() == before


def test_states_of_devices_that_are_not_here_are_passed_over() -> None:
    states = {**current_states(), "cuda9999": torch.zeros(16, dtype=torch.uint8)}
    require_restorable(states)
    restore_states(states)


# The table


def table(random_states: dict[int, dict[str, Tensor]]) -> Steps:
    """Three steps of two batches of one example."""
    three = torch.zeros(3, dtype=torch.float64)
    rates = torch.ones(3, 1, dtype=torch.float64)
    return Steps(
        epoch=torch.zeros(3, dtype=torch.int64),
        learning_rate=rates,
        hyperparameters={"momentum": rates},
        loss=three,
        gradient_norm=three,
        batch_offsets=torch.arange(4) * 2,
        example_offsets=torch.arange(7),
        examples=torch.arange(6),
        accumulation=torch.full((3,), 2),
        random=random_states,
    )


def drawn(cuda: bool = False) -> dict[str, Tensor]:
    numbers()
    states = current_states()
    return {**states, "cuda0": torch.arange(16, dtype=torch.uint8) * 4} if cuda else states


def require_same_random(one: Mapping[int, Any], other: Mapping[int, Any]) -> None:
    assert list(one) == list(other)
    for batch in one:
        require_alike(one[batch], other[batch])


def test_the_table_is_cut_joined_and_read_again(tmp_path: Path) -> None:
    states = {0: drawn(), 3: drawn(), 4: drawn(cuda=True)}
    steps = table(states)
    require_same_random(steps.between(0, 1).random, {0: states[0]})
    require_same_random(steps.between(1, 3).random, {1: states[3], 2: states[4]})
    require_same_random(steps.between(1, 1).random, {})
    require_same_random(
        join_steps([steps.between(0, 1), steps.between(1, 2), steps.between(2, 3)]).random, states
    )
    twice = {**states, 6: states[0], 9: states[3], 10: states[4]}
    require_same_random(join_steps([steps, steps]).random, twice)
    (tmp_path / "steps").mkdir()
    for first, part in ((1, steps), (4, steps.between(1, 3)), (9, table({}))):
        path = write_steps(tmp_path, first, part)
        found = as_tensors(read_steps(path, len(part)))
        require_same_random(found.random, part.random)
        for entry in found.random.values():
            restore_states(entry)
    assert replace(steps, random={}).random == {}
