"""What training tells while it runs, and the report at its end."""

import sys
import types

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

from tda_lightning import AttributionModule, Scores, TdaReport, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import TracIn
from tda_lightning.evaluation.retraining import measure
from tda_lightning.live.page_log import log_page
from tests.attributing import quiet, relative
from tests.runs import Net, Numbered, loader, trainer


class Kept(Logger):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.told = []

    name, version = "kept", 0

    def log_metrics(self, metrics, step=None):
        self.told.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def of(self, name):
        return [(step, told[name]) for step, told in self.told if name in told]


def fitted(*callbacks, logger=False, validation=None):
    torch.manual_seed(0)
    module = Net()
    made = trainer(*callbacks)
    made.loggers = [logger] if logger else []
    made.fit(module, loader(shuffle=True), validation)
    return made, module


def test_the_recorder_tells_the_loggers(tmp_path):
    logger = Kept()
    fitted(TrajectoryRecorder(tmp_path / "run", every_n_steps=4), logger=logger)
    counts = logger.of("tda/checkpoints")
    assert [count for _, count in counts] == [1, 2, 3, 4, 4] and counts[-1][0] == 12
    written = [size for _, size in logger.of("tda/disk_bytes")]
    assert written[:4] == sorted(written[:4])  # at the end files of steps are joined
    files = [file for file in (tmp_path / "run").rglob("*.h5") if "lock" not in file.name]
    assert written[-1] == sum(file.stat().st_size for file in files)
    spent = [seconds for _, seconds in logger.of("tda/recorder_seconds")]
    assert 0 < spent[0] < spent[-1] < 60


def test_a_report_of_the_worst_queries(tmp_path):
    logger, report = Kept(), TdaReport(num_queries=3)
    validation = DataLoader(Numbered(9, seed=1), 4)
    recorder = TrajectoryRecorder(tmp_path / "run")
    _, module = fitted(recorder, report, logger=logger, validation=validation)
    trajectory = Trajectory.load(tmp_path / "run")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    expected = AttributionModule(Net(), trajectory, TracIn()).attribute(
        Numbered(), Numbered(9, seed=1), trainer=quiet()
    )
    last = trajectory.checkpoints[trajectory.last_step]
    state = {**last.buffers, **last.parameters}
    measured = measure(Net(), None, state, Numbered(9, seed=1), trajectory=trajectory)
    worst = measured.argsort(descending=True)[:3]
    assert report.scores.query_indices == worst.tolist()
    assert relative(report.scores.values, expected.values[worst]) < 1e-5
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    assert torch.equal(Scores.load(tmp_path / "run" / "report.h5").values, report.scores.values)
    assert len(logger.of("tda/report_seconds")) == 1
    # The model is as training left it.
    for name, value in state.items():
        assert torch.equal(before[name], value), name


@pytest.mark.parametrize(
    ("recorded", "validation", "said"),
    [
        (False, True, "Expected a TrajectoryRecorder among the trainer's callbacks"),
        (True, False, "Expected one validation loader"),
    ],
)
def test_what_is_missing_is_a_warning(recorded, validation, said, tmp_path):
    callbacks = [TrajectoryRecorder(tmp_path / "run")] if recorded else []
    given = DataLoader(Numbered(4, seed=1), 4) if validation else None
    with pytest.warns(UserWarning, match=said):
        fitted(*callbacks, TdaReport(), validation=given)
    assert not (tmp_path / "run" / "report.html").exists()


def test_an_impossible_number_is_refused():
    with pytest.raises(ValueError, match="num_queries must be at least 1"):
        TdaReport(num_queries=0)


def test_loggers_show_the_page_in_their_own_way(tmp_path, monkeypatch):
    """By the calls that their documentation names; the packages are not needed."""
    page = tmp_path / "report.html"
    page.write_text("<html>")
    calls = []

    def logger(kind, **experiment):
        made = type(kind, (Kept,), {})()
        made.experiment, made.run_id = types.SimpleNamespace(**experiment), "run"
        return made

    loggers = [
        logger("WandbLogger", log=lambda logged: calls.append(logged["tda/report"])),
        logger("MLFlowLogger", log_artifact=lambda run, path: calls.append((run, path))),
        logger("TensorBoardLogger", add_text=lambda name, text, step: calls.append((name, step))),
        Kept(),
    ]
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Html=lambda text: text))
    log_page(types.SimpleNamespace(loggers=loggers, is_global_zero=True, global_step=7), page, 1.5)
    assert calls == ["<html>", ("run", str(page)), ("tda/report", 7)]
    assert all(one.told == [(7, {"tda/report_seconds": 1.5})] for one in loggers)
