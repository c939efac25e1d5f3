"""Curvature statistics gathered in training, where the training is interrupted and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.errors import ResumeError
from tda_lightning.store import layout, open_trajectory
from tda_lightning.store.truncate import truncate_trajectory
from tests.resumable import Resumable, datasets, differences, resumable_loader, train
from tests.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore")

ONLINE: dict[str, Any] = {"every_n_steps": 3, "curvature": "online", "curvature_every": 2}
CASES: dict[str, dict[str, Any]] = {
    "true Fisher": {"recorder": {"every_n_steps": 3, "curvature": "online", "curvature_every": 1}},
    "empirical Fisher": {
        "accumulate_grad_batches": 2,
        "recorder": {"curvature": "online", "curvature_every": 2, "fisher": "empirical"},
    },
    "statistics in float64 by epochs": {
        "recorder": {
            "every_n_epochs": 1,
            "curvature": "online",
            "curvature_every": 1,
            "curvature_dtype": "float64",
            "curvature_dense_side": 0,
        },
    },
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_gathering_resumes(case: str, tmp_path: Path) -> None:
    options = CASES[case]
    train(tmp_path / "whole", kept=tmp_path / "kept", every=1, **options)
    for step in (1, 2, 4):
        run = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", run)
        train(run, resume=tmp_path / "kept" / f"{step}.ckpt", **options)
        count, differing = differences(tmp_path / "whole", run)
        assert count > 100
        assert not differing


def test_statistics_are_among_what_is_compared(tmp_path: Path) -> None:
    train(tmp_path / "run", recorder=ONLINE)
    copy = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    with h5py.File(layout.statistics_file(copy, 3, 6), "r+") as file:
        file["net.0/packed left"][0, 0] += 1e-6
    assert differences(tmp_path / "run", copy)[1] == [
        "statistics/00000003-00000006.h5 net.0/packed left"
    ]


def test_cutting_shows_no_checkpoint_without_its_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after any of the deletions: what is left is a run that ended earlier."""
    train(tmp_path / "run", kept=tmp_path / "kept", recorder=ONLINE)
    run, before = tmp_path / "run", open_trajectory(tmp_path / "run")
    assert [stop for _, stop in before.statistics] == [3, 6, 9, 12]
    remove, seen = Path.unlink, []

    def unlink(path: Path, *args: Any, **options: Any) -> None:
        remove(path, *args, **options)
        left = open_trajectory(run)
        assert [stop for _, stop in left.statistics] == sorted(left.checkpoints)[1:]
        seen.append(left.last_step)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        truncate_trajectory(run, before.facts, 4, [0, 3])
    assert seen[:4] == [9, 6, 3, 3]
    assert [*layout.statistics_files(run)] == [(0, 3)]


def test_statistics_that_are_gone_are_no_resume(tmp_path: Path) -> None:
    train(tmp_path / "run", kept=tmp_path / "kept", recorder=ONLINE)
    layout.statistics_file(tmp_path / "run", 0, 3).unlink()
    with pytest.raises(ResumeError, match=r"curvature statistics up to .* none up to \[3\]"):
        train(tmp_path / "run", resume=tmp_path / "kept" / "4.ckpt", recorder=ONLINE)


@pytest.mark.parametrize(
    "changed",
    [{"curvature": None}, {"fisher": "empirical"}, {"curvature_every": 3}],
    ids=["none", "fisher", "every"],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_other_curvature_is_no_resume(
    changed: dict[str, Any], reverse: bool, tmp_path: Path
) -> None:
    settings = [ONLINE, {**ONLINE, **changed}]
    first, second = reversed(settings) if reverse else settings
    train(tmp_path / "run", kept=tmp_path / "kept", recorder=first)
    before = datasets(tmp_path / "run").keys()
    with pytest.raises(ResumeError, match=r"Curvature statistics would be gathered in another"):
        train(tmp_path / "run", resume=tmp_path / "kept" / "4.ckpt", recorder=second)
    assert datasets(tmp_path / "run").keys() == before


def test_a_further_fit_goes_on_with_statistics(tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(tmp_path / "run", **ONLINE)
    made, module, given = trainer(recorder, max_epochs=1), Resumable(), resumable_loader()
    made.fit(module, given)
    made.fit_loop.max_epochs = 2
    made.fit(module, given)
    found = open_trajectory(tmp_path / "run").statistics
    assert list(found) == [(0, 3), (3, 6), (6, 9), (9, 12)]
    # Steps 2, 4 and 6, 8, 10 and 12; the sixth step of an epoch has two examples.
    assert [float(blocks["net.0"].examples) for blocks in found.values()] == [4, 6, 4, 6]


def test_the_state_with_statistics_is_plain(tmp_path: Path) -> None:
    train(tmp_path / "run", kept=tmp_path / "kept", recorder=ONLINE)
    content = torch.load(tmp_path / "kept" / "4.ckpt", weights_only=True)
    (state,) = (s for k, s in content["callbacks"].items() if k.startswith("TrajectoryRecorder"))
    block = state["parts"]["curvature"]["sums"]["net.0"]
    assert block["parameters"] == ["net.0.weight", "net.0.bias"]
    assert block["examples"].tolist() == [4]  # of step 4; the interval began after step 3
