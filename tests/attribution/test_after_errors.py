"""A module is left as it was, wherever an attribution or an evaluation fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder, evaluation
from tda_lightning.estimators import (
    TRAK,
    FastInfluence,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.records.errors import TrajectoryNotFoundError
from tda_lightning.tasks import TrainingStepTask
from tests.runs import trainer


class Stopped(Exception):
    pass


class Fuse:
    """Raises at its n-th use."""

    def __init__(self) -> None:
        self.left = -1

    def use(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stopped


class Net(LightningModule):
    """Keeps its last batch's labels, in a buffer of another shape each time."""

    def __init__(self, fuse: Fuse, keeps: bool = True) -> None:
        super().__init__()
        self.fuse, self.keeps = fuse, keeps
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.0), nn.Linear(5, 3))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.fuse.use()
        if self.keeps:
            self.register_buffer("last", batch[1], persistent=False)
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(12, 4, generator=generator)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fuse.use()
        return self.inputs[index], torch.tensor(index % 3)


class Measured(TrainingStepTask):
    """Fails where queries are measured."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self._fuse = fuse

    def __deepcopy__(self, memo: Any) -> Measured:
        return self

    def measurement(self, module: nn.Module, batch: Any) -> Tensor:
        self._fuse.use()
        return super().measurement(module, batch)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "run"
    module = Net(Fuse(), keeps=False)
    recorder = TrajectoryRecorder(path, num_checkpoints=2)
    trainer(recorder, max_epochs=2).fit(module, DataLoader(Data(Fuse()), 4))
    return path


def left_as_it_was(module: Net) -> dict[str, Any]:
    return {
        "modes": {name: part.training for name, part in module.named_modules()},
        "required": [p.requires_grad for p in module.parameters()],
        "gradients": [p.grad for p in module.parameters()],
        "values": {name: p.tolist() for name, p in module.named_parameters()},
        "buffers": {name: b.tolist() for name, b in module.named_buffers()},
        "hooks": [
            len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()
        ],
        "trainer": module._trainer,
        "last": hasattr(module, "last"),
        "grad": torch.is_grad_enabled(),
    }


ESTIMATORS = [TRAK(), TracIn(), InfluenceFunction(), FastInfluence(), Source(1), Unrolled()]
WORK: dict[str, Any] = {
    **{
        f"attribute, {type(e).__name__}": lambda a, d, e=e: a(e).attribute(d, d) for e in ESTIMATORS
    },
    "plan": lambda a, d: a(Source(1)).plan(d, d),
    "check": lambda a, d: a(TracIn()).check(d, d),
}
EVALUATION: dict[str, Any] = {
    "retrain": lambda run, m, task, d: evaluation.retrain(run, m, task, d, torch.arange(12.0)),
    "retrain together": lambda run, m, task, d: [
        *evaluation.retrain_each(run, m, task, d, torch.rand(3, 12), together=3)
    ],
    "measure": lambda run, m, task, d: evaluation.measure(
        m, task, {**run.checkpoints[6].parameters}, d, trajectory=run
    ),
}


@pytest.mark.parametrize("place", ["step", "data", "measurement"])
@pytest.mark.parametrize("name", [*WORK, *EVALUATION])
def test_the_module_is_left_as_it_was(name, place, recorded) -> None:
    fuses = {where: Fuse() for where in ("step", "data", "measurement")}
    keeps = "Unrolled" not in name  # which refuses a buffer that training changes
    module, data = Net(fuses["step"], keeps).train(), Data(fuses["data"])
    module.net[1].eval()
    task = Measured(fuses["measurement"])
    before = left_as_it_was(module)
    run = Trajectory.load(recorded)
    failed = 0
    for left in (1, 4, 9, 30):
        fuses[place].left = left
        try:
            if name in WORK:
                WORK[name](lambda e: AttributionModule(module, str(recorded), e, task), data)
            else:
                EVALUATION[name](run, module, task, data)
        except Stopped:
            failed += 1
        fuses[place].left = -1
        shutil.rmtree(recorded / "curvature", ignore_errors=True)
        assert left_as_it_was(module) == before
    assert failed or (place == "measurement" and name.startswith("retrain"))


@pytest.mark.parametrize("estimator", [TracIn(), InfluenceFunction(), Source(1), Unrolled()])
def test_a_folder_that_vanishes_is_said_to_have(estimator, recorded, tmp_path) -> None:
    shutil.copytree(recorded, tmp_path / "run")

    class Vanishing(Measured):
        def measurement(self, module: nn.Module, batch: Any) -> Tensor:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            return super().measurement(module, batch)

    module = Net(Fuse(), keeps=False)
    attribution = AttributionModule(module, str(tmp_path / "run"), estimator, Vanishing(Fuse()))
    with pytest.raises(TrajectoryNotFoundError, match=r"No trajectory in .*run.* \(it does not"):
        attribution.attribute(Data(Fuse()), Data(Fuse()))
    assert module.training
