"""Streams whose batches say which examples they hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import Source, Unrolled
from tda_lightning.records.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tests.attributing import quiet, relative
from tests.runs import trainer

SIZE, EPOCHS = 10, 2
ORDERS = [torch.randperm(SIZE, generator=torch.Generator().manual_seed(n)) for n in range(EPOCHS)]


def row(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(50 + number)
    x = torch.randn(3, generator=generator, dtype=torch.float64)
    return {"x": x, "y": x.sum().sin(), "number": number}


class Rows(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, number: int) -> dict[str, Any]:
        return row(number)


class Shuffled(IterableDataset[dict[str, Any]]):
    """In another order in every epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order, self.epoch = ORDERS[self.epoch], self.epoch + 1
        return (row(number) for number in order.tolist())


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch["x"]).squeeze(1), batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.5)


class Order:
    """The same order from a map-style data set."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        order, self.epoch = ORDERS[self.epoch].tolist(), self.epoch + 1
        return (order[start : start + 4] for start in range(0, SIZE, 4))

    def __len__(self) -> int:
        return 3


def recorded(folder: Path, loader: DataLoader[Any], key: str | None) -> Trajectory:
    recorder = TrajectoryRecorder(folder, every_n_steps=2, index_key=key)
    trainer(recorder, max_epochs=EPOCHS).fit(Net(), loader)
    return Trajectory.load(folder)


def test_a_stream_in_any_order_is_recorded_as_its_copy(tmp_path: Path) -> None:
    plain = recorded(tmp_path / "map", DataLoader(Rows(), batch_sampler=Order()), None)
    stream = DataLoader(Shuffled(), 4)
    found = recorded(tmp_path / "stream", stream, "number")
    assert found.facts.settings["indices"] == "recorded"
    assert torch.equal(found.steps.examples, plain.steps.examples)
    assert torch.equal(found.steps.example_offsets, plain.steps.example_offsets)
    for estimator in (Unrolled(), Source(num_segments=1, order="recorded")):
        values = [
            AttributionModule(Net(), run, estimator)
            .attribute(Rows(), Rows(), batch_size=5, trainer=quiet(), self_influence=False)
            .values
            for run in (found, plain)
        ]
        assert relative(*values) < 1e-12
    short = torch.utils.data.Subset(Rows(), range(int(plain.steps.examples.max())))
    with pytest.raises(TrajectoryMismatchError, match="the stream that the run was .*example 9"):
        AttributionModule(Net(), found, Unrolled()).attribute(short, Rows(), trainer=quiet())


@pytest.mark.parametrize(
    ("key", "got"), [("index", r"got the keys \['x', 'y', 'number'\]"), ("y", "whole numbers")]
)
def test_batches_without_positions_are_refused(key: str, got: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainingError, match=f"index_key='{key}': .*{got}"):
        recorded(tmp_path, DataLoader(Shuffled(), 4), key)
