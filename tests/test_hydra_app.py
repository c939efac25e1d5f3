"""Our configuration groups in a Hydra application that is not ours."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
APP = ROOT / "experiments" / "own_hydra_app" / "app.py"


@pytest.mark.parametrize("estimator", ["source", "tracin"])
def test_a_foreign_application_selects_our_estimators(estimator, tmp_path):
    done = subprocess.run(
        [sys.executable, str(APP), f"estimator={estimator}", "epochs=20"],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "harmed most by examples 40 (-" in done.stdout
    assert list(tmp_path.glob("outputs/*/*/trajectory/trajectory.h5"))


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
