"""An earlier checkpoint that is asked about, against a run that ended there."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Ensemble, Trajectory
from tda_lightning.estimators import (
    TRAK,
    FastInfluence,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.records.errors import TrajectoryMismatchError
from tests.attributing import quiet, relative
from tests.runs import fit, loader

MORE = [
    InfluenceFunction(damping=0.1),
    FastInfluence(k=3, damping=0.1),
    TRAK(projection_dimension=6, relative_damping=0.1),
    Source(num_segments=2, order="recorded"),
]
ESTIMATORS = [
    TracIn(),
    InfluenceFunction(damping="segment", statistics="recorded"),
    Source(num_segments=2),
    Unrolled(),
    *(pytest.param(estimator, marks=pytest.mark.slow) for estimator in MORE),
]


def numbers(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return TensorDataset(x, x.sin().sum(1, keepdim=True))


class Small(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        # The best is neither the first nor the last.
        self.log("val_loss", abs(float(self.global_step) - 12.0))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


TRAIN, QUERY = numbers(22, 1), numbers(4, 2)


def trained(path, **options):
    torch.manual_seed(0)
    saving = ModelCheckpoint(path.parent / "saved", monitor="val_loss", save_top_k=-1)
    recorder = {"every_n_steps": 3, "curvature": "online", "curvature_every": 1}
    return fit(
        path,
        lambda: loader(TRAIN, shuffle=True),
        module=Small(),
        validation=loader(QUERY),
        recorder=recorder,
        callbacks=(saving,),
        enable_checkpointing=True,
        **options,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of 18 steps, and one that ended after 9."""
    folder = tmp_path_factory.mktemp("asked")
    trained(folder / "long" / "run", max_epochs=3)
    trained(folder / "short" / "run", max_steps=9, max_epochs=-1)
    return folder


def scores(run, estimator, train=TRAIN, **asked):
    attribution = AttributionModule(Small(), run, estimator, **asked)
    return attribution.attribute(train, QUERY, trainer=quiet())


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: f"{type(e).__name__}")
def test_an_earlier_checkpoint_is_the_end_of_a_shorter_run(runs, estimator):
    expected = scores(str(runs / "short" / "run"), estimator)
    asked = scores(str(runs / "long" / "run"), estimator, at_step=9)
    assert relative(asked.values.nan_to_num(), expected.values.nan_to_num()) < 1e-12
    assert asked.provenance["steps"] == 9
    assert asked.provenance["measurements"] == expected.provenance["measurements"]
    later = scores(str(runs / "long" / "run"), estimator)
    assert relative(later.values.nan_to_num(), expected.values.nan_to_num()) > 1e-3


def test_the_run_itself_is_what_is_not_cut(runs):
    whole = Trajectory.load(runs / "long" / "run")
    assert sorted(whole.until(18).checkpoints) == sorted(whole.checkpoints)
    cut = whole.until(9)
    assert cut.last_step == cut.num_steps == 9 and sorted(cut.checkpoints) == [0, 3, 6, 9]
    assert max(stop for _, stop in cut.statistics) == 9
    assert cut.until(6).last_step == 6


@pytest.mark.slow
def test_keep_below_one_trains_up_to_the_checkpoint(runs, tmp_path):
    for name in ("long", "short"):
        shutil.copytree(runs / name, tmp_path / name)
    found = [
        AttributionModule(Small(), str(tmp_path / name / "run"), TracIn(), at_step=step)
        .attribute(TRAIN, QUERY, trainer=quiet(), keep=0.5)
        .values
        for name, step in (("long", 9), ("short", None))
    ]
    assert relative(*found) < 1e-12


@pytest.mark.slow
def test_an_ensemble_is_cut_member_by_member(runs):
    whole = Trajectory.load(runs / "long" / "run")
    other = replace(
        whole, facts=replace(whole.facts, settings={**whole.facts.settings, "run_id": "other"})
    )
    found = scores(Ensemble([whole, other]), TracIn(), at_step=9)
    assert relative(found.values, scores(whole.until(9), TracIn()).values) < 1e-12
    with pytest.raises(ValueError, match="members of an ensemble are different runs"):
        scores(Ensemble([whole, other]), TracIn(), ckpt="one.ckpt")


@pytest.mark.parametrize("step", [0, 4, 19, -3])
def test_a_step_without_a_checkpoint_names_those_that_have_one(runs, step):
    with pytest.raises(ValueError, match=r"are at steps 3, 6, 9, 12, 15, 18\. Ask for one of them"):
        scores(str(runs / "long" / "run"), TracIn(), at_step=step)


def test_the_best_checkpoint(runs):
    run = str(runs / "long" / "run")
    known = Trajectory.load(run).facts.settings["best_checkpoint"]
    assert known["monitor"] == "val_loss" and known["score"] == 0.0
    best = scores(run, Source(num_segments=2), ckpt="best")
    assert best.provenance["steps"] == 12
    assert torch.equal(best.values, scores(run, Source(num_segments=2), at_step=12).values)


def test_a_file_of_lightning_between_two_checkpoints(runs, tmp_path):
    """Its weights are those of the run: exact unrolling replays to them, bit for bit."""
    shutil.copytree(runs / "long", tmp_path / "long")
    (tmp_path / "long" / "run" / "checkpoints").rename(tmp_path / "all")
    kept = tmp_path / "long" / "run" / "checkpoints"
    kept.mkdir()
    for file in (tmp_path / "all").iterdir():
        if int("".join(c for c in file.stem if c.isdigit())) in (0, 9, 18):
            shutil.copy(file, kept)
    run = str(tmp_path / "long" / "run")
    saved = next((tmp_path / "long" / "saved").glob("*step=12.ckpt"))
    assert sorted(Trajectory.load(run).checkpoints) == [0, 9, 18]
    found = scores(run, Unrolled(), ckpt=saved)
    assert found.provenance["certificate"]["bit_equal"]
    expected = scores(str(runs / "long" / "run"), Unrolled(), at_step=12)
    assert relative(found.values, expected.values) < 1e-12
    assert torch.equal(
        scores(run, InfluenceFunction(damping=0.1), ckpt="best").values,
        scores(str(runs / "long" / "run"), InfluenceFunction(damping=0.1), at_step=12).values,
    )


def test_what_cannot_be_asked_is_refused(runs, tmp_path):
    run = str(runs / "long" / "run")
    with pytest.raises(ValueError, match="Give at_step or ckpt, got both"):
        scores(run, TracIn(), at_step=9, ckpt="best")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        scores(run, TracIn(), ckpt="nowhere.ckpt")
    other = next((runs / "short" / "saved").glob("*.ckpt"))
    with pytest.raises(TrajectoryMismatchError, match="saved in another run"):
        scores(run, TracIn(), ckpt=other)
    torch.save(Small().state_dict(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="does not say after how many steps"):
        scores(run, TracIn(), ckpt=tmp_path / "plain.pt")
    bare = Trajectory.load(run)
    settings = {k: v for k, v in bare.facts.settings.items() if k != "best_checkpoint"}
    with pytest.raises(ValueError, match="had none with monitor"):
        scores(replace(bare, facts=replace(bare.facts, settings=settings)), TracIn(), ckpt="best")
