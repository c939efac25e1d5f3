"""Ensembles of independent runs: trained by the library, or by a user's own script."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from torch.utils.data import DataLoader

from tda_lightning import AttributionModule, Ensemble, Trajectory, TrajectoryRecorder, ensembles
from tda_lightning.ensembles.folder import seed_of
from tda_lightning.estimators import TracIn
from tda_lightning.records.errors import (
    TrajectoryFormatError,
    TrajectoryMismatchError,
    TrajectoryNotFoundError,
)
from tda_lightning.tasks import AttributionTask
from tests import runs as recorded
from tests.attributing import quiet, relative
from tests.resumable import Resumable, resumable_loader, saves

FIRST = {"number": 1, "folder": "a", "seed": 1, "state": "finished", "reason": ""}

pytestmark = pytest.mark.filterwarnings("ignore:.*(workers|logging interval|checkpoint).*")


class NetTask(AttributionTask):
    def train_loss(self, module: torch.nn.Module, batch: Any) -> torch.Tensor:
        return (module.net(batch[0]) - batch[1]).square().mean(1)  # type: ignore[operator]


class Data(LightningDataModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return recorded.loader(recorded.Numbered(), shuffle=True, generator=order)


class Maker:
    """Makes a training from a seed; that of ``interrupt`` ends by ``failure``."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.interrupt: int | None = None
        self.failure: BaseException = KeyboardInterrupt()
        self.rates: dict[int, float] = {}

    def __call__(self, seed: int) -> ensembles.FreshTraining:
        self.seeds.append(seed)
        rate = self.rates.get(seed, 0.05)
        module = recorded.Net(lambda net: torch.optim.SGD(net.parameters(), rate, 0.9))
        if seed == self.interrupt:
            module.on_train_epoch_end = self._fail  # type: ignore[method-assign]
        return ensembles.FreshTraining(recorded.trainer(), module, Data(seed))

    def _fail(self) -> None:
        raise self.failure


def record(path: Path, seed: int = 7) -> Path:
    """A recorded run, with checkpoints where no schedule would put them."""
    recorder = TrajectoryRecorder(path, every_n_steps=4)
    seed_everything(seed, verbose=False)
    recorded.trainer(recorder).fit(recorded.Net(), datamodule=Data(seed))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = record(tmp_path_factory.mktemp("seeds") / "run")
    ensembles.train(run, Maker(), members=3)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy without members."""
    ignore = shutil.ignore_patterns("ensemble")
    return Path(shutil.copytree(made, tmp_path / "run", ignore=ignore))


def seed(number: int) -> int:
    return seed_of("seeds", number, 7)


def test_members_are_trained_as_by_hand(made: Path, tmp_path: Path) -> None:
    ensemble = Ensemble.load(made / "ensemble" / "seeds")
    assert len(ensemble) == 3 and ensemble.facts is not None
    assert ensemble.facts.kind == "seeds"
    assert [member.seed for member in ensemble.facts.members] == [7, seed(2), seed(3)]
    assert len({7, seed(2), seed(3), seed_of("forks", 2, 7), seed_of("seeds", 2, 8)}) == 5
    by_hand = Trajectory.load(record(tmp_path / "by_hand", seed(2)))
    member = ensemble.trajectories[1]
    assert list(member.checkpoints) == list(by_hand.checkpoints) == [0, 4, 8, 12]
    for step, checkpoint in by_hand.checkpoints.items():
        for name, tensor in {**checkpoint.parameters, **checkpoint.buffers}.items():
            own = member.checkpoints[step]
            assert torch.equal(tensor, {**own.parameters, **own.buffers}[name]), (step, name)
    assert torch.equal(member.steps.examples, by_hand.steps.examples)


def test_scores_are_the_mean_over_members(made: Path) -> None:
    sets = recorded.Numbered(), recorded.Numbered(3, seed=1)

    def values(trajectory: Any) -> Any:
        attribution = AttributionModule(recorded.Net(), trajectory, TracIn(), NetTask())
        return attribution.attribute(*sets, trainer=quiet())

    ensemble = Ensemble.load(made / "ensemble" / "seeds")
    found = values(made / "ensemble" / "seeds")
    alone = torch.stack([values(member).values for member in ensemble])
    assert relative(alone[0], alone[1]) > 1e-2
    assert relative(found.values.double(), alone.double().mean(0)) < 1e-6
    assert found.provenance["ensemble"] == "seeds"
    assert found.provenance["trajectory"][0] == str(made)
    assert found.provenance["notes"] == values(ensemble.trajectories[0]).provenance["notes"]


def test_an_interrupted_ensemble_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = Maker()
    make.interrupt = seed(3)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        ensembles.train(run, make, members=3)
    assert make.seeds == [seed(2), seed(3)]
    folder = run / "ensemble" / "seeds"
    # What was recorded of the third is a trajectory, but no member.
    assert Trajectory.load(folder / "member-3").last_step == 6
    assert len(Ensemble.load(folder)) == 2
    make.interrupt = None
    assert len(ensembles.train(run, make, members=3)) == 3
    assert make.seeds == [seed(2), seed(3), seed(3)]
    assert "Member 3 was cut off and starts anew" in capsys.readouterr().err
    assert Trajectory.load(folder / "member-3").last_step == 12
    assert len(ensembles.train(run, make, members=2)) == 3
    assert len(make.seeds) == 3


def test_a_member_that_diverges_is_named_and_the_others_are_kept(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = Maker()
    make.rates = {seed(2): 1e30}
    with pytest.warns(UserWarning, match="The training loss of step 2 is"):
        assert len(ensembles.train(run, make, members=3)) == 2
    said = capsys.readouterr().err
    assert f"Member 2 (seed {seed(2)}) diverged and is left out: " in said
    assert "is not finite at the end, step 12" in said
    ensembles.train(run, make, members=3)
    assert make.seeds == [seed(2), seed(3)]


def test_a_disk_without_room_is_refused_before_the_first_training(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 20, 1 << 20, 1 << 10))
    make = Maker()
    match = r"4 members of up to .* KiB take .* KiB, and the disk of .* has 1.0 KiB left"
    with pytest.raises(OSError, match=match):
        ensembles.train(run, make)
    assert not make.seeds


def test_a_script_of_ones_own(made: Path, run: Path) -> None:
    before = torch.get_rng_state()
    assert ensembles.unfinished(run, members=3) == [2, 3]
    with pytest.raises(ZeroDivisionError), ensembles.member(run, 2):
        raise ZeroDivisionError
    with pytest.raises(TrajectoryNotFoundError), ensembles.member(run, 2):
        pass
    with ensembles.member(run, 2) as own:
        assert own.seed == seed(2)
        recorded.trainer(own.recorder()).fit(recorded.Net(), datamodule=Data(own.seed))
    assert torch.equal(torch.get_rng_state(), before)
    assert ensembles.unfinished(run, members=3) == [3]
    found, expected = (
        Ensemble.load(folder / "ensemble" / "seeds").trajectories[1] for folder in (run, made)
    )
    assert torch.equal(found.steps.loss, expected.steps.loss)
    with pytest.raises(ValueError, match="Member 2 is finished"), ensembles.member(run, 2):
        pass


def test_a_script_resumes_its_member(run: Path, tmp_path: Path) -> None:
    """By the recorder's own resume, with a loader that Lightning can resume."""

    def fit(own: Any, module: Any, **options: Any) -> None:
        keeps = saves(tmp_path / str(own.number), every=1)
        trainer = recorded.trainer(own.recorder(), keeps, enable_checkpointing=True)
        trainer.fit(module, resumable_loader(), **options)

    with ensembles.member(run, 2) as whole:
        fit(whole, Resumable())
    broken = Resumable()
    broken.on_train_batch_end = _interrupt_at_nine(broken)  # type: ignore[method-assign]
    with pytest.raises((KeyboardInterrupt, SystemExit)), ensembles.member(run, 3) as own:
        fit(own, broken)
    assert ensembles.unfinished(run, members=3) == [3]
    with ensembles.member(run, 3) as own:
        fit(own, Resumable(), ckpt_path=tmp_path / "3" / "8.ckpt")
    assert ensembles.unfinished(run, members=3) == []
    one, other = (Trajectory.load(own.folder) for own in (whole, own))
    assert other.last_step == 12 and other.steps.examples.equal(one.steps.examples)
    assert not other.steps.loss.equal(one.steps.loss)


def _interrupt_at_nine(module: Any) -> Any:
    def interrupt(*_: Any) -> None:
        if module.global_step == 9:
            raise KeyboardInterrupt

    return interrupt


def test_an_error_after_an_infinite_loss_is_a_divergence(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = Maker()
    make.failure = RuntimeError("as planned")
    make.rates, make.interrupt = {seed(2): 1e30}, seed(2)
    with pytest.warns(UserWarning, match="is inf|is nan"):
        ensembles.train(run, make, members=3)
    said = capsys.readouterr().err
    assert re.search(r"diverged .*: the loss of step \d is not finite, and then: as planned", said)
    make.rates, make.interrupt = {}, seed(4)
    with pytest.raises(RuntimeError, match="as planned"):
        ensembles.train(run, make, members=4)


class TestBadInput:
    def test_a_training_that_ignores_its_seed(self, run: Path) -> None:
        def deaf(seed: int) -> ensembles.FreshTraining:
            seed_everything(7, verbose=False)
            return ensembles.FreshTraining(recorded.trainer(), recorded.Net(), Data(7))

        with pytest.raises(ValueError, match="Member 2 .* is the same run as member 1"):
            ensembles.train(run, deaf, members=3)

    def test_a_trainer_that_records_already(self, run: Path) -> None:
        def make(seed: int) -> ensembles.FreshTraining:
            trainer = recorded.trainer(TrajectoryRecorder(run, overwrite=True))
            return ensembles.FreshTraining(trainer, recorded.Net(), Data(seed))

        with pytest.raises(ValueError, match="expected one without"):
            ensembles.train(run, make)
        assert Trajectory.load(run).last_step == 12

    @pytest.mark.parametrize("members", [0, 1])
    def test_fewer_than_two(self, members: int, run: Path) -> None:
        with pytest.raises(ValueError, match="at least two members"):
            ensembles.train(run, Maker(), members)

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(TrajectoryNotFoundError):
            ensembles.train(tmp_path, Maker())
        with pytest.raises(TrajectoryNotFoundError, match="No ensemble in"):
            Ensemble.load(tmp_path)

    def test_another_run_recorded_in_its_place(self, made: Path, run: Path) -> None:
        shutil.copytree(made / "ensemble", run / "ensemble")
        recorder = TrajectoryRecorder(run, overwrite=True)
        recorded.trainer(recorder).fit(recorded.Net(), datamodule=Data(1))
        with pytest.raises(TrajectoryMismatchError, match="recorded again since"):
            Ensemble.load(run / "ensemble" / "seeds")
        with pytest.raises(TrajectoryMismatchError, match="recorded again since"):
            ensembles.train(run, Maker())

    @pytest.mark.parametrize(
        "damage",
        [
            {"format": "other"},
            {"format_version": 2},
            {"kind": "chance"},
            {"run": "/etc"},
            {"run_id": 3},
            {"members": {}},
            {"members": [{"number": 2, "folder": "a", "seed": 1, "state": "finished"}]},
            {"members": [{**FIRST, "seed": "1"}]},
            {"members": [{**FIRST, "folder": "/a"}]},
            {"members": [{**FIRST, "state": "well"}]},
            {"settings": 1},
        ],
    )
    def test_a_damaged_file(self, damage: dict[str, Any], tmp_path: Path) -> None:
        whole = {"format": "tda-lightning ensemble", "format_version": 1, "kind": "seeds"}
        whole |= {"run": "../..", "run_id": "a", "members": [], "settings": {}}
        file = tmp_path / "ensemble.json"
        file.write_text(json.dumps({**whole, **damage}))
        with pytest.raises(TrajectoryFormatError, match=r"ensemble.json is damaged"):
            Ensemble.load(tmp_path)
        file.write_text(json.dumps(whole)[:-4])
        with pytest.raises(TrajectoryFormatError, match=r"ensemble.json is damaged"):
            Ensemble.load(tmp_path)
        file.write_text(json.dumps(whole))
        with pytest.raises(TrajectoryNotFoundError, match="holds 0 finished of 0"):
            Ensemble.load(tmp_path)
