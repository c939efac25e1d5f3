"""Records are loaded and saved by the store, which they do not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SAVES = """
import sys, torch
from {home} import Scores
assert not any(name.startswith("tda_lightning.store") for name in sys.modules)
Scores(torch.ones(2, 3)).save(sys.argv[1])
assert torch.equal(Scores.load(sys.argv[1]).values, torch.ones(2, 3))
assert not any(name.split(".")[0] in ("lightning", "rich") for name in sys.modules)
"""
LOADS = """
import sys
from {home} import Trajectory
try:
    Trajectory.load(sys.argv[1])
except FileNotFoundError as error:
    assert "No trajectory in" in str(error)
else:
    raise AssertionError
assert not any(name.split(".")[0] in ("lightning", "rich") for name in sys.modules)
"""


@pytest.mark.parametrize(
    ("code", "home"),
    [
        (SAVES, "tda_lightning"),
        (SAVES, "tda_lightning.records.scores"),
        (LOADS, "tda_lightning"),
        (LOADS, "tda_lightning.records.trajectory"),
    ],
)
def test_in_a_fresh_process(code: str, home: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", code.format(home=home), str(tmp_path / "file.h5")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
