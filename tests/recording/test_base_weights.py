"""A small part is trained on a large frozen base: checkpoints name the base and do not hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.ensembles.recorder import AdapterRecorder
from tda_lightning.estimators import Source, TracIn, Unrolled
from tda_lightning.records.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tests.attributing import quiet
from tests.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, RANK = 8, 2


class Quantised(nn.Module):
    """Stands for a layer of bitsandbytes: a weight of 8 bits with a scale for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


class Adapted(LightningModule):
    """A frozen layer with a low-rank adapter."""

    def __init__(self, seed: int = 0, quantised: bool = False, unfreeze: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        base: nn.Module = nn.Linear(WIDTH, WIDTH, bias=False).double().requires_grad_(False)
        self.base = Quantised(base) if quantised else base
        generator = torch.Generator().manual_seed(7)
        self.down = nn.Parameter(torch.randn(RANK, WIDTH, generator=generator).double())
        self.up = nn.Parameter(torch.zeros(1, RANK).double())
        self.unfreeze, self.drift = unfreeze, False

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x).tanh().sum(1, keepdim=True) + x @ self.down.T @ self.up.T

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def on_train_epoch_start(self) -> None:
        if self.unfreeze and self.current_epoch == 1:
            self.base.requires_grad_(True)
        if self.drift and self.current_epoch == 1:
            self.base.weight.data.add_(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, WIDTH, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def fitted(folder: Path, recorder: type[TrajectoryRecorder] = TrajectoryRecorder, **options: Any):
    module = Adapted(**options)
    loader = DataLoader(data(), 4)
    trainer(recorder(folder, num_checkpoints=3)).fit(module, loader)
    return module


@pytest.mark.parametrize("quantised", [False, True])
def test_checkpoints_hold_what_is_trained_and_score_alike(tmp_path: Path, quantised: bool) -> None:
    fitted(tmp_path / "bare", quantised=quantised)
    fitted(tmp_path / "whole", AdapterRecorder, quantised=quantised)
    bare, whole = (Trajectory.load(tmp_path / name) for name in ("bare", "whole"))
    assert set(bare.facts.base) == {"base.weight"}
    assert not whole.facts.base
    assert "base.weight" in whole.checkpoints[0].buffers
    for step in bare.checkpoints:
        assert "base.weight" not in bare.checkpoints[step].buffers
        assert set(bare.checkpoints[step].parameters) == {"down", "up"}
    for estimator in (Source(), Unrolled()):
        scores = [
            AttributionModule(Adapted(quantised=quantised), str(tmp_path / name), estimator)
            .attribute(data(), data(), batch_size=4, trainer=quiet())
            .values
            for name in ("bare", "whole")
        ]
        assert torch.equal(*scores)


def test_another_base_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path / "run")
    with pytest.raises(TrajectoryMismatchError, match="1 of 1 differ, as base.weight"):
        AttributionModule(Adapted(seed=1), str(tmp_path / "run"), TracIn())
    merged = Adapted()
    merged.base.weight.data += 1e-6
    with pytest.raises(TrajectoryMismatchError, match="no adapter merged into them"):
        AttributionModule(merged, str(tmp_path / "run"), TracIn())
    half = Adapted()
    half.base.float()
    with pytest.raises(TrajectoryMismatchError, match="in the same precision"):
        AttributionModule(half, str(tmp_path / "run"), TracIn())


def test_a_base_that_is_trained_later_is_recorded_then(tmp_path: Path) -> None:
    fitted(tmp_path / "run", unfreeze=True)
    fitted(tmp_path / "whole", AdapterRecorder, unfreeze=True)
    run, whole = (Trajectory.load(tmp_path / name) for name in ("run", "whole"))
    assert not run.facts.base
    assert sorted(run.checkpoints) == sorted(whole.checkpoints)
    for step in run.checkpoints:
        found, expected = run.checkpoints[step], whole.checkpoints[step]
        for name, value in {**expected.buffers, **expected.parameters}.items():
            assert torch.equal({**found.buffers, **found.parameters}[name], value)
    scores = AttributionModule(Adapted(seed=5), str(tmp_path / "run"), Source(num_segments=1))
    assert scores.attribute(data(), data(), batch_size=4, trainer=quiet()).values.abs().sum() > 0


def test_a_frozen_base_that_changes_is_an_error_by_name(tmp_path: Path) -> None:
    module = Adapted()
    module.drift = True
    with pytest.raises(UnsupportedTrainingError, match="base.weight is frozen, and expected"):
        trainer(TrajectoryRecorder(tmp_path, num_checkpoints=3)).fit(module, DataLoader(data(), 4))


def test_a_small_frozen_part_is_recorded(tmp_path: Path) -> None:
    class Mostly(Adapted):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(WIDTH, 64).double()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.more(x).mean(1, keepdim=True)

    module = Mostly()
    trainer(TrajectoryRecorder(tmp_path, num_checkpoints=2)).fit(module, DataLoader(data(), 4))
    run = Trajectory.load(tmp_path)
    assert not run.facts.base
    assert torch.equal(run.checkpoints[run.last_step].buffers["base.weight"], module.base.weight)


def test_a_quantised_layer_that_trains_is_refused(tmp_path: Path) -> None:
    module = Adapted()
    weight = module.base.weight.detach().to(torch.float8_e4m3fn)
    module.base.weight = nn.Parameter(weight)
    with pytest.raises(UnsupportedTrainingError, match=r"base.weight is quantised .*float8_e4m3fn"):
        trainer(TrajectoryRecorder(tmp_path)).fit(module, DataLoader(data(), 4))


@pytest.mark.parametrize("continues", [True, False])
def test_a_stage_on_the_end_of_the_stage_before(tmp_path: Path, continues: bool) -> None:
    """Its base comes from there, whatever the module holds."""

    class Whole(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.base = nn.Linear(WIDTH, WIDTH, bias=False).double()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.mse_loss(self.base(batch[0]).tanh().sum(1, keepdim=True), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05)

    first, second = Whole(), Adapted()
    trainer(TrajectoryRecorder(tmp_path / "1", num_checkpoints=3)).fit(first, DataLoader(data(), 4))
    if continues:
        second.base.load_state_dict(first.base.state_dict())
    trainer(TrajectoryRecorder(tmp_path / "2", num_checkpoints=3)).fit(
        second, DataLoader(data(), 4)
    )
    stages = [str(tmp_path / "1"), str(tmp_path / "2")]
    modules = [Whole(), Adapted(seed=9)]
    if not continues:
        with pytest.raises(TrajectoryMismatchError, match="not consecutive stages"):
            AttributionModule(modules, stages, Source(num_segments=1))
        return
    source = AttributionModule(modules, stages, Source(num_segments=1))
    one = source.attribute([data(), data()], data(), batch_size=4, trainer=quiet())
    again = AttributionModule([Whole(), second], stages, Source(num_segments=1))
    two = again.attribute([data(), data()], data(), batch_size=4, trainer=quiet())
    assert torch.equal(one.values, two.values)
    assert bool(one.values.any())
