"""Our configuration groups in a Hydra application that is not ours."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
APP = ROOT / "experiments" / "own_hydra_app" / "app.py"


def test_a_foreign_application_selects_our_estimators(tmp_path):
    done = subprocess.run(
        [sys.executable, str(APP), "--multirun", "estimator=source,tracin", "epochs=20"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name in ("Source", "TracIn"):
        assert f"{name}: harmed most by examples 40 (-" in done.stdout
    assert len(list(tmp_path.glob("multirun/*/*/*/trajectory/trajectory.h5"))) == 2
