"""Ensembles of low-rank adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Ensemble, Trajectory, TrajectoryRecorder, ensembles
from tda_lightning.attribution import member_modules
from tda_lightning.attribution.member_modules import adapted
from tda_lightning.estimators import InfluenceFunction, TracIn, Unrolled
from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.records.trajectory import ParameterFact
from tests import runs as recorded
from tests.attributing import quiet, relative

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*(workers|logging interval|LeafSpec).*")
NAMES = ("first", "second")


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.3, 0.9)


class ByHand(Net):
    """W + B A, written out."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.requires_grad_(False)
        for name, out, inputs in (("first", 4, 3), ("second", 3, 4)):
            self.register_parameter(f"{name}_A", nn.Parameter(torch.zeros(rank, inputs).double()))
            self.register_parameter(f"{name}_B", nn.Parameter(torch.zeros(out, rank).double()))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first.weight + self.first_B @ self.first_A
        second = self.second.weight + self.second_B @ self.second_A
        hidden = F.linear(x, first, self.first.bias).tanh()
        return F.linear(hidden, second, self.second.bias)


def renamed(name: str) -> str:
    name = name.replace(".base_layer.", ".")
    for letter in "AB":
        name = name.replace(f".lora_{letter}.default.weight", f"_{letter}")
    return name


def as_by_hand(run: Trajectory) -> Trajectory:
    """The trajectory of the adapters by the names of :class:`ByHand`."""

    def changed(tensors: Any) -> Any:
        return {renamed(name): value for name, value in tensors.items()}

    checkpoints = {
        step: dataclasses.replace(
            one, parameters=changed(one.parameters), buffers=changed(one.buffers), optimizer=None
        )
        for step, one in run.checkpoints.items()
    }
    settings = {k: v for k, v in run.facts.settings.items() if k != member_modules.ADAPTERS}
    parameters: dict[str, ParameterFact] = changed(run.facts.parameters)
    facts = dataclasses.replace(run.facts, parameters=parameters, settings=settings, stages=())
    return dataclasses.replace(run, facts=facts, checkpoints=checkpoints, path=None)


def examples(size: int = 12, seed: int = 0) -> TensorDataset:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TensorDataset(x, x.argmax(1))


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(examples(), 4, shuffle=True)


def make(seed: int) -> ensembles.FreshTraining:
    return ensembles.FreshTraining(recorded.trainer(), Net(), Data())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "run"
    seed_everything(3, verbose=False)
    recorder = TrajectoryRecorder(path, num_checkpoints=2)
    recorded.trainer(recorder).fit(Net(), datamodule=Data())
    return path


@pytest.fixture(scope="module")
def ensemble(run: Path) -> Ensemble:
    return ensembles.adapt(run, make, members=2, rank=2)


def scores(module: nn.Module, trajectory: Any, estimator: Any) -> Any:
    attribution = AttributionModule(module, trajectory, estimator)
    return attribution.attribute(examples(), examples(3, seed=1), trainer=quiet())


@pytest.mark.parametrize("estimator", [TracIn(), InfluenceFunction(curvature="exact", damping=0.1)])
def test_a_member_is_the_model_with_its_adapters_added(estimator: Any, ensemble: Ensemble) -> None:
    found = scores(Net(), ensemble, estimator)
    by_hand = [scores(ByHand(), as_by_hand(member), estimator).values for member in ensemble]
    assert relative(by_hand[0], by_hand[1]) > 1e-2
    for number, expected in enumerate(by_hand):
        assert relative(found.member(number).values, expected) < 1e-9
    assert relative(found.values, torch.stack(by_hand).mean(0)) < 1e-9
    assert found.provenance["trained_parameters"] == 2 * (3 + 4) + 2 * (4 + 3)


def test_adapters_begin_at_the_end_of_the_run(ensemble: Ensemble, run: Path) -> None:
    end = Trajectory.load(run)
    last = end.checkpoints[end.last_step].parameters
    for member in ensemble:
        assert sorted(map(renamed, member.facts.parameters)) == [
            "first_A", "first_B", "second_A", "second_B",
        ]  # fmt: skip
        for step in member.checkpoints:
            buffers = {renamed(n): v for n, v in member.checkpoints[step].buffers.items()}
            assert all(buffers[name].equal(value) for name, value in last.items())
        start = {renamed(n): v for n, v in member.checkpoints[0].parameters.items()}
        assert not bool(start["first_B"].any()) and bool(start["first_A"].any())
    module = Net()
    module.load_state_dict(last)
    x = examples().tensors[0]
    assert torch.equal(adapted(module, 2)[0](x), module(x))


def test_the_linear_layers_of_gpt2_get_adapters() -> None:
    """They are of a class of their own; the head alone is an ``nn.Linear``."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2)
    ).eval()
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    made, chosen = adapted(model, 2)
    assert chosen == [*(f"transformer.h.0.{name}" for name in layers), "lm_head"]
    tokens = torch.arange(6)[None]
    assert torch.equal(made(tokens).logits, model(tokens).logits)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "c_fc.lora_B" in name:
                parameter.add_(1.0)
        down = dict(made.named_parameters())["transformer.h.0.mlp.c_fc.lora_A.default.weight"]
        model.transformer.h[0].mlp.c_fc.weight += (torch.ones(32, 2) @ down).T
    assert torch.allclose(made(tokens).logits, model(tokens).logits, atol=1e-6)


def test_their_training_can_be_unrolled(ensemble: Ensemble) -> None:
    found = scores(Net(), ensemble.trajectories[0], Unrolled())
    assert found.provenance["certificate"]["bit_equal"]


def test_bad_input(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="rank must be at least 1"):
        ensembles.adapt(run, make, rank=0)
    with pytest.raises(TrajectoryMismatchError, match="has no third to put an adapter into"):
        adapted(Net(), 2, ["third"])
    monkeypatch.setattr(member_modules, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'tda-lightning\[lora\]'"):
        ensembles.adapt(run, make)
