"""SIGTERM ends a training and an attribution, and leaves nothing half done."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tda_lightning import Trajectory
from tda_lightning.runtime.termination import ended_by_sigterm
from tests.scripts import Script

_WORK = """
import sys, time, warnings
import torch, torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.estimators import TracIn

warnings.simplefilter("ignore")
what, folder = sys.argv[1:]

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Data(Dataset):
    slow = lambda: False
    def __len__(self):
        return 40
    def __getitem__(self, index):
        if index > 8 and Data.slow():
            if index == 9:
                print("under way", flush=True)
            time.sleep(0.3)
        return torch.full((4,), index / 40), torch.tensor(index % 3)

def trainer(*callbacks, **options):
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False,
                   enable_progress_bar=False, enable_model_summary=False,
                   callbacks=list(callbacks), **options)

module, data = Net(), Data()
if what == "train":
    Data.slow = lambda: module._trainer is not None and module.trainer.global_step > 0
    trainer(TrajectoryRecorder(folder + "/run", num_checkpoints=2000), max_epochs=100).fit(
        module, DataLoader(data, 2))
else:
    trainer(TrajectoryRecorder(folder + "/run", num_checkpoints=1), max_epochs=1).fit(
        module, DataLoader(data, 8))
    module.train()
    attribution = AttributionModule(module, folder + "/run", TracIn())
    Data.slow = lambda: attribution._work is not None
    try:
        attribution.attribute(data, data, batch_size=2, scores_path=folder + "/scores.h5")
    finally:
        print("put back" if module.training else "left in eval mode", flush=True)
print("went to its end", flush=True)
"""


def _terminated(what: str, folder: Path) -> tuple[int, str, float]:
    """Exit status and output of the work, sent SIGTERM while under way, and how long it took."""
    path = folder.parent / f"{what}.py"
    path.write_text(_WORK)
    script = Script(path, what, str(folder), folder=folder)
    assert script.output.readline() == "under way\n"
    began = time.monotonic()
    os.kill(script.pid, signal.SIGTERM)
    status, out, _ = script.end()
    return status, out, time.monotonic() - began


def test_an_attribution_ends(tmp_path) -> None:
    status, out, seconds = _terminated("attribute", tmp_path)
    assert status == 128 + signal.SIGTERM
    assert out == "put back\n"
    assert seconds < 8  # the walk would take nine more
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_recorded_training_ends_and_can_be_read(tmp_path) -> None:
    """Lightning ends it after the batch under way."""
    _, out, seconds = _terminated("train", tmp_path)
    assert out == ""
    assert seconds < 8  # an epoch takes twelve
    assert Trajectory.load(tmp_path / "run").num_steps >= 2


def test_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    passed: list[int] = []

    def work() -> None:
        with ended_by_sigterm(passed.append):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 143 and passed == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
    found = []
    thread = threading.Thread(target=lambda: found.append(_in_block()))
    thread.start()
    thread.join()
    assert found == [before]


def _in_block() -> object:
    with ended_by_sigterm(lambda _: None):
        return signal.getsignal(signal.SIGTERM)
