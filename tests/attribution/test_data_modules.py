"""A LightningDataModule in the place of a data set: its loader and its transfer hooks, and the
module's, in Lightning's own order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.attribution.stages import training_sets
from tda_lightning.cli.recorded_run import sources
from tda_lightning.estimators import TracIn, Unrolled
from tda_lightning.evaluation import landing_error, measure, retrain
from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.runtime.loading import ExampleSource
from tests.attributing import quiet
from tests.standing import by_hand, standing_run, tracin

SIZE = 8
X = torch.randn(SIZE, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
Y = torch.arange(SIZE) % 2
DATA = TensorDataset(X, Y)
BATCHES = [[0, 1, 2, 3], [4, 5, 6, 7]]


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(3, 2).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.3)


class Hooked(Net):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return [moved[0] + 1, moved[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] ** 2, batch[1]]


class Data(LightningDataModule):
    """Set up in Lightning's order; not before, and not twice."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)
        self.data = DATA

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, 4)


class Before(Data):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] - 5, batch[1]]


class Transfer(Data):
    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return [3 * batch[0].to(device), batch[1].to(device)]


class After(Data):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [(batch[0] - 5) / 3, batch[1]]


class Late(Before, After):
    pass


class Training(Data):
    """A hook that asks its trainer."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * (2 if self.trainer.training else 7), batch[1]]


CASES = {
    "none": (Net, Data, lambda x: x),
    "before": (Net, Before, lambda x: x - 5),
    "transfer": (Net, Transfer, lambda x: 3 * x),
    "after": (Net, After, lambda x: (x - 5) / 3),
    "before and after": (Net, Late, lambda x: (x - 10) / 3),
    "asks its trainer": (Net, Training, lambda x: 2 * x),
    "the module's": (Hooked, Data, lambda x: (2 * x + 1) ** 2),
    "the data module's wins before": (Hooked, Before, lambda x: (x - 4) ** 2),
    "the data module's wins in transfer": (Hooked, Transfer, lambda x: (6 * x) ** 2),
    "the data module's wins after": (Hooked, After, lambda x: (2 * x - 4) / 3),
}


@pytest.mark.parametrize("name", CASES)
def test_batches_go_through_the_hooks_in_lightnings_order(name: str) -> None:
    kind, data, change = CASES[name]
    module = kind()
    losses = [
        F.cross_entropy(module.net(change(x[None])), y[None]) for x, y in zip(X, Y, strict=True)
    ]
    given = data()
    scores = tracin(module, standing_run(module, BATCHES), given, Subset(DATA, [3, 1]))
    torch.testing.assert_close(scores.values, by_hand(module, losses, [losses[3], losses[1]]))
    assert given.calls == ["prepare", "fit"] and given.trainer is None


def fitted(module: Net, data: Any, path: Path) -> Trajectory:
    trainer = quiet(max_epochs=2, callbacks=[TrajectoryRecorder(path, num_checkpoints=1)])
    trainer.fit(module, data)
    return Trajectory.load(path)


@pytest.mark.filterwarnings("ignore:You have overridden")
def test_a_run_with_hooks_needs_its_data_module(tmp_path: Path) -> None:
    module, data = Hooked(), After()
    run = fitted(module, data, tmp_path / "run")
    assert run.facts.settings["transfer_hooks"] == {
        "module": [
            "on_before_batch_transfer",
            "transfer_batch_to_device",
            "on_after_batch_transfer",
        ],
        "data_module": ["on_after_batch_transfer"],
    }
    attribution = AttributionModule(module, run, Unrolled())
    wanted = "pass the data module: attribute"
    for ask in (
        lambda: attribution.attribute(DATA, DATA, trainer=quiet()),
        lambda: attribution.plan(DATA, DATA, trainer=quiet()),
        lambda: attribution.check(DATA, DATA),
        lambda: retrain(run, module, None, DATA, torch.ones(SIZE)),
        lambda: measure(module, None, run.checkpoints[4].parameters, DATA, trajectory=run),
    ):
        with pytest.raises(TrajectoryMismatchError, match=f"(?i){wanted}"):
            ask()
    calls = list(data.calls)
    assert landing_error(run, retrain(run, module, None, data, torch.ones(SIZE))) == 0
    queries = ExampleSource.of(DATA, 4, "query", data)
    before = measure(module, None, run.checkpoints[4].parameters, queries, trajectory=run)
    change = 1e-6
    weights = torch.ones(SIZE, dtype=torch.float64)
    slopes = []
    for sign in (1, -1):
        weights[2] = 1 + sign * change
        state = retrain(run, module, None, data, weights)
        slopes.append(sign * measure(module, None, state, queries, trajectory=run) / (2 * change))
    scores = attribution.attribute(data, DATA, trainer=quiet())
    torch.testing.assert_close(scores.values[:, 2], -sum(slopes), rtol=1e-5, atol=1e-8)
    expected = F.cross_entropy(module.net(((2 * X + 1) - 5) / 3), Y, reduction="none")
    torch.testing.assert_close(before, expected.detach())
    assert data.calls == calls  # it is set up already
    with pytest.raises(TypeError, match=r"query=datamodule.val_dataloader\(\)"):
        attribution.attribute(data, data)


class Collating(After):
    """As the command line wants it, with a way of its own to make batches."""

    train_dataset = query_dataset = DATA

    def train_dataloader(self) -> DataLoader:
        return DataLoader(DATA, 2, shuffle=True, collate_fn=tenfold)

    val_dataloader = train_dataloader

    def render(self, split: str, index: int) -> Any:
        raise NotImplementedError


def tenfold(items: list[Any]) -> Any:
    return [10 * torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])]


def test_the_command_line_makes_batches_as_the_loaders_do() -> None:
    module = Net()
    train, query = sources(Collating(), 4)
    assert (train.batch_size, train.num_workers) == (4, 0)
    for source in (train, query):
        x, y = source.batch([5, 3], module)
        torch.testing.assert_close(x, (10 * X[[5, 3]] - 5) / 3)
        assert torch.equal(y, Y[[5, 3]])


def test_a_data_module_without_hooks_may_be_left_out(tmp_path: Path) -> None:
    module = Net()
    run = fitted(module, Data(), tmp_path / "run")
    own = AttributionModule(module, run, TracIn()).attribute(DATA, DATA, trainer=quiet())
    again = AttributionModule(module, run, TracIn()).attribute(Data(), DATA, trainer=quiet())
    assert torch.equal(own.values, again.values)


def test_each_stage_may_have_its_data_module() -> None:
    given = [Data(), DataLoader(DATA, 4), ExampleSource.of(DATA, 4, "training")]
    assert training_sets(given, 3) == given
    with pytest.raises(ValueError, match="a list of one for each of the 2 trajectories"):
        training_sets(given, 2)


def test_a_data_module_of_several_loaders_is_refused() -> None:
    class Several(Data):
        def train_dataloader(self) -> Any:
            return {"a": super().train_dataloader(), "b": super().train_dataloader()}

    module = Net()
    with pytest.raises(TypeError, match="a dict of loaders, expected one"):
        tracin(module, standing_run(module, BATCHES), Several(), DATA)
