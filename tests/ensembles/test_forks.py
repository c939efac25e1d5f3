"""Ensembles of forks: runs that leave the recorded one at a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from tda_lightning import AttributionModule, Ensemble, Trajectory, TrajectoryRecorder, ensembles
from tda_lightning.attribution import what_if
from tda_lightning.ensembles.forks import drawn_anew
from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.records.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tda_lightning.replay.measured import MeasuredWalk
from tda_lightning.store import layout
from tests import runs as recorded
from tests.attributing import quiet, relative

pytestmark = pytest.mark.filterwarnings("ignore:.*(workers|logging interval|LeafSpec).*")
SIZE, RATE, CLIP = 11, 0.2, 0.4


class Net(LightningModule):
    """In double precision; ``noisy`` drops units and adds noise to the targets."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3 * noisy), nn.Tanh())
        self.head = nn.Linear(4, 1)
        self.double()
        self.noisy, self.steps, self.fail_at, self.nan_at = noisy, 0, -1, -1

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        x, y = batch
        if self.noisy and self.training:
            y = y + 0.1 * torch.randn_like(y)
        self.steps += 1
        if self.steps == self.fail_at:
            raise KeyboardInterrupt
        loss = F.mse_loss(self.head(self.net(x)), y)
        return loss * float("nan") if self.steps == self.nan_at else loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), RATE, 0.9, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def examples(size: int = SIZE, seed: int = 0) -> TensorDataset:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TensorDataset(x, x.sum(1, keepdim=True).tanh())


def record(path: Path, noisy: bool = False, loader: dict[str, Any] | None = None) -> Path:
    """Twelve steps, three in each epoch, with a checkpoint after every second one."""
    seed_everything(3, verbose=False)
    options = {"batch_size": 4, "shuffle": True, **(loader or {})}
    trainer = recorded.trainer(
        TrajectoryRecorder(path, every_n_steps=2), max_epochs=4, gradient_clip_val=CLIP
    )
    trainer.fit(Net(noisy), DataLoader(examples(), **options))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = record(tmp_path_factory.mktemp("forks") / "plain")
    ensembles.fork(run, Net(), examples(), members=3)
    return run


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = record(tmp_path_factory.mktemp("forks") / "noisy", noisy=True)
    ensembles.fork(run, Net(noisy=True), examples(), members=3)
    return run


@pytest.fixture
def run(plain: Path, tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("ensemble")
    return Path(shutil.copytree(plain, tmp_path / "run", ignore=ignore))


@pytest.mark.parametrize(("number", "step"), [(2, 6), (3, 8)])
def test_a_fork_is_plain_training_from_the_checkpoint(number: int, step: int, plain: Path) -> None:
    member = Ensemble.load(plain / "ensemble" / "forks").trajectories[number - 1]
    run = Trajectory.load(plain)
    module, start = Net(), run.checkpoints[step]
    module.load_state_dict({**start.buffers, **start.parameters})
    optimizer = torch.optim.SGD(module.parameters(), RATE, 0.9, weight_decay=0.01)
    for name, parameter in module.named_parameters():
        assert start.optimizer is not None
        optimizer.state[parameter]["momentum_buffer"] = start.optimizer[name]["momentum_buffer"]
    x, y = examples().tensors
    steps = member.steps
    for row in range(step, 12):
        (chosen,) = steps.batches(row)
        optimizer.param_groups[0]["lr"] = RATE * 0.95**row
        optimizer.zero_grad()
        loss = F.mse_loss(module.head(module.net(x[chosen])), y[chosen])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(module.parameters()), CLIP)
        optimizer.step()
        assert float(steps.loss[row]) == pytest.approx(float(loss), rel=1e-12)
        assert float(steps.gradient_norm[row]) == pytest.approx(float(norm), rel=1e-12)
        assert float(steps.clipping[row]) == pytest.approx(min(1, CLIP / float(norm)), rel=1e-5)
        if row + 1 in member.checkpoints:
            found = member.checkpoints[row + 1]
            for name, parameter in module.named_parameters():
                assert relative(found.parameters[name], parameter.detach()) < 1e-13
                assert found.optimizer is not None
                own = optimizer.state[parameter]["momentum_buffer"]
                assert relative(found.optimizer[name]["momentum_buffer"], own) < 1e-13
    assert bool((steps.clipping < 1).any())
    assert steps.learning_rate.equal(run.steps.learning_rate)


class WithAdamW(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.02, weight_decay=0.5)


def test_a_fork_of_adamw_is_plain_training_too(tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    recorder = TrajectoryRecorder(tmp_path, every_n_steps=2)
    loader = DataLoader(examples(), 4, shuffle=True)
    recorded.trainer(recorder, accumulate_grad_batches=2).fit(WithAdamW(), loader)
    (_, member) = ensembles.fork(tmp_path, WithAdamW(), examples(), members=2, at=[2])
    module, start = WithAdamW(), Trajectory.load(tmp_path).checkpoints[2]
    module.load_state_dict({**start.buffers, **start.parameters})
    optimizer: Any = module.configure_optimizers()
    for name, parameter in module.named_parameters():
        assert start.optimizer is not None
        optimizer.state[parameter] = {k: v.clone() for k, v in start.optimizer[name].items()}
    x, y = examples().tensors
    for row in range(2, member.num_steps):
        optimizer.zero_grad()
        for chosen in member.steps.batches(row):
            (F.mse_loss(module.head(module.net(x[chosen])), y[chosen]) / 2).backward()
        optimizer.step()
    assert member.num_steps == 4
    for name, parameter in module.named_parameters():
        assert relative(member.checkpoints[4].parameters[name], parameter.detach()) < 1e-13


def test_its_order_is_fresh_and_its_past_is_shared(plain: Path) -> None:
    run, root = Trajectory.load(plain), plain / "ensemble" / "forks"
    ensemble = Ensemble.load(root)
    assert ensemble.facts is not None and ensemble.facts.settings == {"at": [6, 8]}
    for member, step in zip(ensemble.trajectories[1:], (6, 8), strict=True):
        assert list(member.checkpoints) == list(run.checkpoints)
        assert member.path is not None
        for at, file in layout.checkpoint_files(Path(member.path)).items():
            shared = file.samefile(layout.checkpoint_file(plain, at))
            assert shared == (at <= step)
        before, after = (s.steps.between(0, step) for s in (run, member))
        assert before.examples.equal(after.examples) and before.loss.equal(after.loss)
        assert not member.steps.examples.equal(run.steps.examples)
        assert member.steps.example_offsets.equal(run.steps.example_offsets)
        # Every epoch has every example once, the one that the fork began in the middle of, too.
        for epoch in member.steps.examples.split(SIZE):
            assert sorted(epoch.tolist()) == list(range(SIZE))


def test_a_fork_lands_on_its_end(noisy: Path) -> None:
    """Replayed, with its noise."""
    member = Ensemble.load(noisy / "ensemble" / "forks").trajectories[2]
    attribution = AttributionModule(Net(noisy=True), member, Unrolled())
    scores = attribution.attribute(
        examples(), examples(1, seed=1), trainer=quiet(), self_influence=False
    )
    certificate = scores.provenance["certificate"]
    assert certificate["bit_equal"] and certificate["checkpoints"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [TracIn(), InfluenceFunction(), Source(2), Source(2, order="recorded"), Unrolled()],
    ids=lambda estimator: f"{type(estimator).__name__}-{getattr(estimator, 'order', '')}",
)
def test_every_estimator_takes_forks(estimator: Any, noisy: Path) -> None:
    def scores(trajectory: Any) -> Any:
        attribution = AttributionModule(Net(noisy=True), trajectory, estimator)
        return attribution.attribute(examples(), examples(3, seed=1), trainer=quiet())

    ensemble = Ensemble.load(noisy / "ensemble" / "forks")
    found, alone = scores(ensemble), [scores(member) for member in ensemble]
    values = torch.stack([one.values for one in alone])
    assert relative(values[0], values[1]) > 1e-3
    assert relative(found.values, values.mean(0)) < 1e-10
    if isinstance(estimator, Unrolled):
        assert all(one.provenance["certificate"]["bit_equal"] for one in alone)


def test_what_if_runs_of_forks_have_a_common_past_too(
    noisy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is trained once, and what follows comes out as that of the fork by itself."""
    rows: list[int] = []
    measured_step = MeasuredWalk.measured_step

    def counted(self: Any, row: int) -> None:
        rows.append(row)
        measured_step(self, row)

    monkeypatch.setattr(MeasuredWalk, "measured_step", counted)

    def asked(trajectory: Any) -> Any:
        attribution = AttributionModule(Net(noisy=True), trajectory, TracIn())
        queries = examples(2, seed=1)
        return attribution.attribute(examples(), queries, keep=0.5, trainer=quiet())

    run, _, fork = Ensemble.load(noisy / "ensemble" / "forks")
    ensemble = Ensemble([run, fork])
    attribution = AttributionModule(Net(noisy=True), ensemble, TracIn())
    monkeypatch.setattr(what_if, "seconds_of_run", lambda *_: 36.0)
    planned = what_if.seconds_of_runs(attribution.members, [None], None)  # type: ignore[list-item]
    assert planned == pytest.approx((2, 2, 24))  # seconds on average
    found = asked(ensemble)
    assert rows == [*range(12), *range(8, 12)]
    made = Trajectory.load(found.provenance["what_if"]["runs"][1])
    shutil.rmtree(Path(str(fork.path)) / "what_if")
    alone = asked(fork)
    assert relative(alone.values, found.member(1).values) < 1e-12
    whole = Trajectory.load(alone.provenance["what_if"]["runs"][0])
    assert whole.steps.loss.equal(made.steps.loss) and len(rows) == 16 + 12
    assert whole.steps.examples.equal(made.steps.examples)
    assert list(whole.checkpoints) == list(made.checkpoints)


def test_before_they_leave_forks_are_no_ensemble(plain: Path) -> None:
    """Members would be alike, and their spread 0."""
    root = str(plain / "ensemble" / "forks")
    with pytest.raises(ValueError, match="After step 6, members 1 and 2 .* still the same run"):
        AttributionModule(Net(), root, TracIn(), at_step=6)
    with pytest.raises(ValueError, match="members 1 and 3"):
        AttributionModule(Net(), root, TracIn(), at_step=8)
    assert len(AttributionModule(Net(), root, TracIn(), at_step=10).members) == 3


def test_a_fork_that_was_cut_off_goes_on(
    plain: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Net()
    module.fail_at = 2 + 5  # the check takes steps 9 and 10; then the fork takes 7 to 11
    with pytest.raises(KeyboardInterrupt):
        ensembles.fork(run, module, examples(), members=3)
    folder = run / "ensemble" / "forks" / "member-2"
    assert Trajectory.load(folder).last_step == 10
    ensembles.fork(run, Net(), examples(), members=3)
    assert "Member 2 was cut off and goes on from step 10" in capsys.readouterr().err
    for number in (2, 3):
        expected, found = (
            Trajectory.load(at / "ensemble" / "forks" / f"member-{number}") for at in (plain, run)
        )
        assert found.steps.loss.equal(expected.steps.loss)
        for name, tensor in expected.checkpoints[12].parameters.items():
            assert tensor.equal(found.checkpoints[12].parameters[name])


def test_a_fork_that_diverges_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Net()
    module.nan_at = 2 + 3
    assert len(ensembles.fork(run, module, examples(), members=3)) == 2
    assert "Member 2 " in (said := capsys.readouterr().err)
    assert "diverged and is left out: the loss of step 9 is nan" in said


def test_what_the_loader_does_is_done(tmp_path: Path) -> None:
    dropping = Trajectory.load(record(tmp_path / "dropping", loader={"drop_last": True}))
    assert dropping.num_steps == 8
    found = drawn_anew(dropping, 4, seed=0).examples.split(8)
    assert all(len(set(epoch.tolist())) == 8 for epoch in found)
    assert set(found[2].tolist()) != set(dropping.steps.examples.split(8)[2].tolist())

    sampler = WeightedRandomSampler(torch.arange(11.0), 11)
    loader = {"sampler": sampler, "shuffle": False}
    weighted = Trajectory.load(record(tmp_path / "weighted", loader=loader))
    found, before = (s.examples.split(11) for s in (drawn_anew(weighted, 6, 0), weighted.steps))
    assert [epoch.sort().values.tolist() for epoch in found] == [
        epoch.sort().values.tolist() for epoch in before
    ]
    assert [a.equal(b) for a, b in zip(found, before, strict=True)] == [True, True, False, False]

    ordered = record(tmp_path / "ordered", loader={"shuffle": False})
    with pytest.raises(ValueError, match="is the same run as member 1"):
        ensembles.fork(ordered, Net(), examples(), members=2)


class TestBadInput:
    @pytest.mark.parametrize("at", [[0], [12], [5], []])
    def test_a_step_without_a_checkpoint(self, at: list[int], run: Path) -> None:
        with pytest.raises(ValueError, match=r"\[2, 4, 6, 8, 10\], got "):
            ensembles.fork(run, Net(), examples(), at=at)

    def test_other_points_than_before(self, plain: Path) -> None:
        with pytest.raises(ValueError, match=r"was made with {'at': \[6, 8\]}, got {'at': \[4\]}"):
            ensembles.fork(plain, Net(), examples(), at=[4])

    def test_a_run_without_optimizer_states(self, tmp_path: Path) -> None:
        recorder = TrajectoryRecorder(tmp_path, num_checkpoints=4, save_optimizer=False)
        recorded.trainer(recorder).fit(Net(), DataLoader(examples(), 4))
        with pytest.raises(UnsupportedTrainingError, match="does not hold the optimizer's state"):
            ensembles.fork(tmp_path, Net(), examples())

    def test_other_data(self, run: Path) -> None:
        with pytest.raises(TrajectoryMismatchError, match="not the recorded one"):
            ensembles.fork(run, Net(), examples(seed=1))

    def test_another_training(self, run: Path) -> None:
        module = Net()
        module.training_step = lambda *batch: 2 * Net.training_step(module, *batch)  # type: ignore
        with pytest.raises(TrajectoryMismatchError, match="lands elsewhere than recorded at step"):
            ensembles.fork(run, module, examples())
        assert not (run / "ensemble" / "forks" / "member-2").exists()
