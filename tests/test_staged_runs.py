"""Recorded runs of several stages, attributed: freezing, thawing and further fits, against
unrolling through the recorded steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.callbacks import TrajectoryRecorder
from tda_lightning.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tda_lightning.report import write_report
from tda_lightning.store import open_trajectory
from tda_lightning.tasks import RegressionTask
from tda_lightning.trajectory import StageFact, Trajectory
from tests import oracles
from tests.attributing import CaseTask, quiet, relative
from tests.oracles.runs_in_stages import unrolled_run
from tests.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore")

TRUNK, HEAD = ("trunk.weight", "trunk.bias"), ("head.weight", "head.bias")
LOSS = oracles.loss_of(oracles.mean_squared_error)


def regression(size: int, seed: int, outputs: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(size, outputs, generator=generator, dtype=torch.float64)


DATA, QUERIES = regression(8, 1), regression(3, 2)


class Linear(LightningModule):
    """Two branches that are both linear: curvature is constant, and they couple."""

    def __init__(self, make: Callable[[Any], Any], filtered: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.make, self.filtered = make, filtered
        self.trunk, self.head = nn.Linear(3, 2), nn.Linear(3, 2)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.trunk(inputs) + self.head(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return self.make([p for p in self.parameters() if p.requires_grad or not self.filtered])


class Trains(Callback):
    """What each two epochs train, of "t" and "h"."""

    def __init__(self, plan: str) -> None:
        self.plan = plan.split()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        now = self.plan[trainer.current_epoch // 2]
        pl_module.trunk.requires_grad_("t" in now)
        pl_module.head.requires_grad_("h" in now)


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.trunk)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.trunk, optimizer, lr=0.03)


def sgd(**options: Any) -> Callable[[Any], Any]:
    return lambda parameters: torch.optim.SGD(parameters, 0.1, **options)


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, 0.05, weight_decay=0.1, eps=1e-4)


def record(
    path: Path, module: LightningModule, *callbacks: Any, fits: tuple[int, ...], **options: Any
) -> Trajectory:
    """Fits of so many times two steps, each of two accumulated batches: all examples."""
    recorder = TrajectoryRecorder(path, **{"every_n_steps": 1, **options})
    made = trainer(*callbacks, recorder, max_epochs=0, accumulate_grad_batches=2)
    for number in range(len(fits)):
        made.fit_loop.max_epochs = 2 * sum(fits[: number + 1])
        made.fit(module, DataLoader(TensorDataset(*DATA), 4))
    return open_trajectory(path)


def scores(trajectory: Any, module: nn.Module, estimator: Any, data: Any = DATA) -> Any:
    attribution = AttributionModule(module, trajectory, estimator, CaseTask("regression"))
    return attribution.attribute(
        TensorDataset(*data), TensorDataset(*QUERIES), batch_size=4, trainer=quiet()
    )


RECORDED = Source(2, curvature="exact", order="recorded")
MOMENTUM = {"momentum": 0.9}
CASES: dict[str, tuple[dict[str, Any], str, tuple[int, ...], int]] = {
    # What SGD is given, what each epoch trains, the fits, and how many stages there are.
    "newly trained": (MOMENTUM, "h th th", (3,), 2),
    "frozen on the way": (MOMENTUM, "th th h", (3,), 2),
    "old buffers wait": (MOMENTUM, "th h th t th", (5,), 5),
    "nesterov": ({**MOMENTUM, "nesterov": True, "weight_decay": 0.1}, "th h th", (3,), 3),
    "dampened": ({**MOMENTUM, "dampening": 0.3}, "th h th", (3,), 3),
    "dampened, one by one": ({**MOMENTUM, "dampening": 0.3}, "h t h", (3,), 3),
    "a further fit": (MOMENTUM, "th th th", (1, 2), 2),
    "dampened fits": ({**MOMENTUM, "dampening": 0.3}, "th th th", (1, 1, 1), 3),
    "frozen between fits": (MOMENTUM, "h th th", (1, 2), 2),
    "fits and stages": (MOMENTUM, "th h th th", (1, 2, 1), 4),
}


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_order_is_exact_unrolling(name: str, tmp_path: Path) -> None:
    """Least squares with a checkpoint after every step: nothing is approximated."""
    options, plan, fits, stages = CASES[name]
    module = Linear(sgd(**options))
    trajectory = record(tmp_path, module, Trains(plan), fits=fits)
    assert len(trajectory.facts.stages) == stages
    truth = unrolled_run(trajectory, module, LOSS, DATA, QUERIES)
    found = scores(trajectory, module, RECORDED)
    assert found.values.shape == (3, 8)
    assert relative(found.values, truth) < 1e-9
    assert truth.abs().max() > 1e-2


def test_a_group_that_a_finetuning_callback_adds(tmp_path: Path) -> None:
    module = Linear(sgd(momentum=0.9), filtered=True)
    trajectory = record(tmp_path, module, Thaws(), fits=(3,))
    assert trajectory.facts.stages == (StageFact(0, HEAD), StageFact(2, (*TRUNK, *HEAD)))
    truth = unrolled_run(trajectory, module, LOSS, DATA, QUERIES)
    assert relative(scores(trajectory, module, RECORDED).values, truth) < 1e-9
    average = scores(trajectory, module, Source(2, curvature="exact", momentum="recursion"))
    assert 1e-6 < relative(average.values, truth) < 0.5


def test_dampened_first_steps_beside_others_are_refused(tmp_path: Path) -> None:
    module = Linear(sgd(momentum=0.9, dampening=0.3))
    trajectory = record(tmp_path, module, Trains("h th"), fits=(2,))
    with pytest.raises(UnsupportedTrainingError, match=r"trunk.weight \(2 .*Use order='average'"):
        scores(trajectory, module, RECORDED)
    scores(trajectory, module, Source(2, curvature="exact"))


ADAM = {
    "newly trained": ("h th th", (3,)),
    "old moments wait": ("th h th", (3,)),
    "a further fit": ("th th th", (1, 2)),
}


@pytest.mark.parametrize("name", ADAM)
def test_the_recorded_order_of_adam_is_exact_unrolling(name: str, tmp_path: Path) -> None:
    plan, fits = ADAM[name]
    module = Linear(adamw)
    trajectory = record(tmp_path, module, Trains(plan), fits=fits)
    truth = unrolled_run(trajectory, module, LOSS, DATA, QUERIES)
    found = scores(trajectory, module, RECORDED)
    assert relative(found.values, truth) < 1e-9


@pytest.mark.parametrize("make", [sgd(momentum=0.9), adamw])
def test_a_last_stage_alone_goes_on_with_its_state(make: Any, tmp_path: Path) -> None:
    """Its columns are those of the whole, and neither knows where the moments came from."""
    module = Linear(make)
    trajectory = record(tmp_path, module, Trains("h th th"), fits=(3,))
    truth = unrolled_run(trajectory, module, LOSS, DATA, QUERIES, since=2)
    last = trajectory.stages()[-1]
    assert last.steps_before == dict.fromkeys(HEAD, 2)
    assert relative(scores(last, module, RECORDED).values, truth) < 1e-9
