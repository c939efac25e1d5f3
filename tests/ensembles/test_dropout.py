"""Ensembles of dropout masks: the recorded run seen without some of its units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Ensemble, Trajectory, TrajectoryRecorder, ensembles
from tda_lightning.attribution.member_modules import DROPOUT, drawn_mask, dropout_sites, masked
from tda_lightning.estimators import InfluenceFunction, TracIn, Unrolled
from tda_lightning.records.errors import (
    TrajectoryMismatchError,
    UnsupportedTrainingError,
)
from tests import runs as recorded
from tests.attributing import quiet, relative

pytestmark = pytest.mark.filterwarnings("ignore:.*(workers|logging interval|LeafSpec).*")
RATE = 0.3


class Net(LightningModule):
    """Two hidden layers; the activations are functions, and there is no dropout."""

    def __init__(self, masks: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)
        self.double()
        self.masks = masks or {}
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh() * self.masks.get("second", 1)
        hidden = self.second(hidden).tanh() * self.masks.get("head", 1)
        return self.head(hidden)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        used = [p for name, p in self.named_parameters() if "unused" not in name]
        return torch.optim.SGD(used, 0.2, 0.9)


def examples(size: int = 12, seed: int = 0) -> TensorDataset:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TensorDataset(x, x.argmax(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dropout") / "run"
    seed_everything(3, verbose=False)
    recorder = TrajectoryRecorder(path, num_checkpoints=2)
    recorded.trainer(recorder, max_epochs=2).fit(Net(), DataLoader(examples(), 4, shuffle=True))
    return path


@pytest.fixture(scope="module")
def ensemble(run: Path) -> Ensemble:
    return ensembles.drop_out(run, Net(), members=2, rate=RATE, layers=["second", "head"])


def scores(module: nn.Module, trajectory: Any, estimator: Any) -> Any:
    attribution = AttributionModule(module, trajectory, estimator)
    return attribution.attribute(examples(), examples(3, seed=1), trainer=quiet())


@pytest.mark.parametrize("estimator", [TracIn(), InfluenceFunction(curvature="exact", damping=0.1)])
def test_a_member_is_the_model_with_the_mask_multiplied_in(
    estimator: Any, ensemble: Ensemble, run: Path
) -> None:
    found = scores(Net(), ensemble, estimator)
    expected = []
    for number, member in enumerate(ensemble):
        seed = member.facts.settings[DROPOUT]["seed"]
        masks = {"second": drawn_mask("second", 8, RATE, seed)}
        masks["head"] = drawn_mask("head", 6, RATE, seed)
        by_hand = scores(Net(masks), Trajectory.load(run), estimator)
        assert relative(found.member(number).values, by_hand.values) < 1e-10
        measured = by_hand.provenance["measurements"]
        assert found.member(number).provenance["measurements"] == pytest.approx(measured)
        expected.append(by_hand.values)
    assert found.provenance["sizes"].startswith("ranks only")
    assert "one run under fixed dropout masks" in found.provenance["notes"][0]
    assert relative(expected[0], expected[1]) > 1e-2
    assert relative(found.values, torch.stack(expected).mean(0)) < 1e-10
    assert relative(scores(Net(), Trajectory.load(run), estimator).values, expected[0]) > 1e-2


def test_masks_are_inverted_dropout_and_differ(ensemble: Ensemble) -> None:
    mask = drawn_mask("layer", 10_000, RATE, 5)
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - RATE)}
    assert float((mask == 0).double().mean()) == pytest.approx(RATE, abs=0.02)
    assert not mask.equal(drawn_mask("layer", 10_000, RATE, 6))
    assert not mask.equal(drawn_mask("other", 10_000, RATE, 5))
    assert mask[:100].equal(drawn_mask("layer", 100, RATE, 5)[:100])
    seeds = {member.facts.settings[DROPOUT]["seed"] for member in ensemble}
    assert len(seeds) == 2


def test_masks_are_off_in_training_and_for_the_module_itself() -> None:
    module = Net()
    own = masked(module, ["head"], 0.5, 1)
    x = examples().tensors[0]
    assert torch.equal(own.train()(x), module(x))
    assert not torch.equal(own.eval()(x), module.eval()(x))


def test_where_masks_are_by_default() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 4, 3), nn.Flatten(1))
    plain.append(nn.Linear(4, 2))
    assert dropout_sites(plain) == ["2", "4"]
    with_dropout = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    assert dropout_sites(with_dropout) == ["1"]
    # Channels of pictures, units elsewhere, for every example alike.
    x = torch.ones(2, 1, 5, 5)
    own = masked(plain, ["2"], 0.5, 3).eval()
    seen: list[Tensor] = []
    own[2].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    own(x)
    expected = plain[0](x).relu() * drawn_mask("2", 2, 0.5, 3).float()[:, None, None]
    torch.testing.assert_close(seen[0], expected)
    sequence = torch.ones(2, 5, 3)
    own = masked(with_dropout, ["1"], 0.5, 3).eval()
    hidden = with_dropout[0](sequence) * drawn_mask("1", 4, 0.5, 3).float()
    torch.testing.assert_close(own(sequence), with_dropout[2](hidden))


def test_files_are_shared(ensemble: Ensemble, run: Path) -> None:
    member = Path(str(ensemble.trajectories[0].path))
    for name in ("checkpoints/00000006.h5", "steps/00000001-00000006.h5"):
        assert (member / name).samefile(run / name)
    assert not (member / "trajectory.h5").samefile(run / "trajectory.h5")


class TestBadInput:
    def test_exact_unrolling(self, ensemble: Ensemble) -> None:
        with pytest.raises(UnsupportedTrainingError, match="under a dropout mask"):
            AttributionModule(Net(), ensemble, Unrolled())  # before what-if runs are trained

    @pytest.mark.parametrize("rate", [0, 1, -0.1, float("nan")])
    def test_an_impossible_rate(self, rate: float, run: Path) -> None:
        with pytest.raises(ValueError, match="rate must be between 0 and 1"):
            ensembles.drop_out(run, Net(), rate=rate)

    def test_other_settings_than_before(self, ensemble: Ensemble, run: Path) -> None:
        with pytest.raises(ValueError, match="was made with"):
            ensembles.drop_out(run, Net(), rate=0.5, layers=["second", "head"])

    def test_parts_that_are_not_there(self, ensemble: Ensemble, run: Path) -> None:
        with pytest.raises(ValueError, match=r"got \['third'\]"):
            ensembles.drop_out(run, Net(), layers=["third"])

        class Other(Net):
            def __init__(self) -> None:
                super().__init__()
                self.tail = self.head

        with pytest.raises(TrajectoryMismatchError, match="has no tail, where"):
            masked(Net(), ["tail"], 0.1, 0)

    def test_a_part_that_is_never_reached(self, run: Path, tmp_path: Path) -> None:
        import shutil

        copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("ensemble"))
        made = ensembles.drop_out(copy, Net(), members=2, layers=["unused"])
        with pytest.raises(UnsupportedTrainingError, match="does not go through unused"):
            scores(Net(), made, TracIn())


def test_masks_share_one_what_if_run(ensemble: Ensemble, tmp_path: Path) -> None:
    """Masks are off in training, so half of the data would have led all members to one run."""
    train, queries = examples(), examples(3, seed=1)

    def asked(trajectory: Any) -> Any:
        attribution = AttributionModule(Net(), trajectory, InfluenceFunction(damping=0.1))
        return attribution.attribute(train, queries, keep=0.5, trainer=quiet())

    planned = AttributionModule(Net(), ensemble, InfluenceFunction(damping=0.1)).plan(
        train, queries, keep=0.5, trainer=quiet()
    )
    assert planned.passes[0].count == 1
    found = asked(ensemble)
    folders = [Path(str(member.path)) / "what_if" for member in ensemble]
    assert [folder.exists() for folder in folders] == [True, False]
    for number, member in enumerate(ensemble):
        alone = asked(member)  # trains the second member's own
        torch.testing.assert_close(found.member(number).values, alone.values, rtol=0, atol=0)
    assert not torch.allclose(found.member(0).values, found.member(1).values, rtol=0.01)
    assert folders[1].exists()
