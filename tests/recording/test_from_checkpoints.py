"""Runs put together from checkpoints, against the same runs recorded."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import (
    TRAK,
    FastInfluence,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.records.errors import (
    TrajectoryFormatError,
    TrajectoryMismatchError,
    UnsupportedTrainingError,
)
from tests.attributing import quiet, relative
from tests.runs import fit, loader

STEPS = [2, 6, 8]
MANY = [TracIn(), Source(num_segments=2)]
ONE = [
    InfluenceFunction(damping=0.1),
    FastInfluence(k=3, damping=0.1),
    TRAK(projection_dimension=6, relative_damping=0.1),
]


def numbers(count, seed):
    x = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sin().sum(1, keepdim=True))


class Normed(LightningModule):
    """With buffers (a batch norm), a frozen parameter and a tied one."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        self.net.double()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)
        self.head = self.net[3]

    def forward(self, x):
        return self.scale * self.net(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.05, momentum=0.5, weight_decay=0.01)


TRAIN, QUERY = numbers(20, 1), numbers(4, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recorded run of even use, with a checkpoint of Lightning's beside each of its own."""
    folder = tmp_path_factory.mktemp("kept")
    torch.manual_seed(0)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    recorder = {"every_n_steps": 2}
    module = fit(
        folder / "run",
        lambda: loader(TRAIN, 5, shuffle=True),
        module=Normed(),
        recorder=recorder,
        callbacks=(saving,),
        enable_checkpointing=True,
    )
    recorded = Trajectory.load(folder / "run")
    assert recorded.num_steps == 8
    kept = {n: c for n, c in recorded.checkpoints.items() if n in (0, *STEPS)}
    for step in STEPS:
        state = {**kept[step].buffers, **kept[step].parameters}
        state |= {f"head.{n}": state[f"net.3.{n}"] for n in ("weight", "bias")}
        assert state.keys() == module.state_dict().keys()
        torch.save(state, folder / f"{step}.pt")
    object.__setattr__(recorded, "checkpoints", kept)
    return folder, recorded


def scores(trajectory, estimator, module=None):
    attribution = AttributionModule(module or Normed(), trajectory, estimator)
    return attribution.attribute(TRAIN, QUERY, trainer=quiet())


def optimizer():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=9.0, momentum=0.5, weight_decay=0.01)


def test_files_of_lightning_say_everything(run):
    folder, recorded = run
    made = Trajectory.from_checkpoints(
        [folder / f"step={step}.ckpt" for step in STEPS], optimizer="SGD"
    )
    assert made.steps.learning_rate[:, 0].tolist() == [0.05] * 8
    assert sorted(made.checkpoints) == STEPS
    for estimator in MANY:
        expected = scores(recorded, estimator)
        found = scores(made, estimator)
        assert relative(found.values.nan_to_num(), expected.values.nan_to_num()) < 1e-12
        assert any("put together from checkpoints" in note for note in found.provenance["notes"])


def test_state_dicts_and_files_of_them(run):
    folder, recorded = run
    states = [torch.load(folder / f"{step}.pt") for step in STEPS]
    files = [str(folder / f"{step}.pt") for step in STEPS]
    for given in (states, files):
        made = Trajectory.from_checkpoints(given, [0.05, 0.05, 0.05], optimizer(), STEPS)
        assert relative(scores(made, MANY[1]).values, scores(recorded, MANY[1]).values) < 1e-12


def test_a_rate_for_each_checkpoint(run):
    """TracIn is linear in the rates: with a rate at one checkpoint alone it is the part there."""
    folder, recorded = run
    parts = scores(recorded, TracIn()).by_segment
    files = [folder / f"{step}.pt" for step in STEPS]
    for number in range(3):
        rates = [0.1 * (number == n) for n in range(3)]  # momentum is of the optimizer
        made = Trajectory.from_checkpoints(files, rates, optimizer(), STEPS)
        assert relative(scores(made, TracIn()).values, 2 * parts[number]) < 1e-12


def test_one_checkpoint_is_enough_for_influence(run):
    folder, recorded = run
    made = Trajectory.from_checkpoints([folder / "8.pt"], optimizer=optimizer())
    for estimator in ONE:
        expected = scores(recorded, estimator).values
        assert relative(scores(made, estimator).values.nan_to_num(), expected.nan_to_num()) < 1e-12
    bare = Trajectory.from_checkpoints([folder / "8.pt"])
    assert scores(bare, ONE[0]).values.isfinite().all()


@pytest.mark.parametrize(
    ("estimator", "said"),
    [
        (TracIn(), "TracIn needs the learning rates"),
        (Source(), "Source needs the learning rates"),
        (InfluenceFunction(damping="segment"), "InfluenceFunction needs the learning rates"),
        (Source(order="recorded"), r"Source\(order='recorded'\) follows the batches"),
        (Unrolled(), "Unrolled replays the run"),
    ],
)
def test_what_needs_more_is_refused_by_name(run, estimator, said):
    made = Trajectory.from_checkpoints([run[0] / "8.pt"])
    with pytest.raises(UnsupportedTrainingError, match=said):
        AttributionModule(Normed(), made, estimator)


def test_source_needs_the_optimizer_and_keep_the_batches(run):
    made = Trajectory.from_checkpoints([run[0] / "8.pt"], 0.1)
    with pytest.raises(UnsupportedTrainingError, match="Source needs the optimizer"):
        AttributionModule(Normed(), made, Source())
    made = Trajectory.from_checkpoints([run[0] / "8.pt"], 0.1, optimizer())
    attribution = AttributionModule(Normed(), made, TracIn())
    with pytest.raises(UnsupportedTrainingError, match="keep below 1 trains the run again"):
        attribution.attribute(TRAIN, QUERY, trainer=quiet(), keep=0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoints": "8.pt"}, "must be a list"),
        ({"checkpoints": []}, "must be a list"),
        ({"checkpoints": ["2.pt", "8.pt"]}, "Give steps="),
        ({"checkpoints": ["2.pt", "8.pt"], "steps": [8, 2]}, "in order of training"),
        ({"checkpoints": ["2.pt"], "steps": [0]}, "in order of training"),
        ({"checkpoints": ["2.pt"], "steps": [1, 2]}, "one number for each of the 1"),
        ({"checkpoints": ["2.pt"], "learning_rates": [1.0, 2.0]}, "one for each of the 1"),
        ({"checkpoints": ["2.pt"], "learning_rates": -1.0}, "finite and not negative"),
        ({"checkpoints": ["2.pt"], "optimizer": "SGD"}, "do not have the settings of SGD"),
        ({"checkpoints": ["2.pt"], "optimizer": "Magic"}, "no formula for the optimizer 'Magic'"),
    ],
)
def test_what_does_not_fit_is_refused(run, given, said, monkeypatch):
    monkeypatch.chdir(run[0])
    with pytest.raises(ValueError, match=said):
        Trajectory.from_checkpoints(**given)


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))


def test_nothing_is_unpickled(tmp_path):
    torch.save({"weight": torch.zeros(1), "more": Harmful()}, tmp_path / "harmful.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Harmful()))
    (tmp_path / "text.pt").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("harmful.pt", "plain.pkl", "text.pt", "list.pt"):
        with pytest.raises(TrajectoryFormatError):
            Trajectory.from_checkpoints([tmp_path / name])
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        Trajectory.from_checkpoints([tmp_path / "nothing.pt"])


def test_checkpoints_of_another_module_are_refused(run):
    other = nn.Linear(3, 1).double()
    made = Trajectory.from_checkpoints([run[0] / "8.pt"])
    with pytest.raises(TrajectoryMismatchError, match=r"not in the module: .*net\.0"):
        AttributionModule(other, made, ONE[0])
    with pytest.raises(TrajectoryMismatchError, match="not in the checkpoints: bias"):
        AttributionModule(
            other, Trajectory.from_checkpoints([{"weight": other.weight.data}]), ONE[0]
        )
    with pytest.raises(ValueError, match="different models"):
        Trajectory.from_checkpoints(
            [other.state_dict(), nn.Linear(4, 1).double().state_dict()], steps=[1, 2]
        )
