"""Our configuration groups in a Hydra application that is not ours."""

from pathlib import Path

from tests.scripts import Script

ROOT = Path(__file__).parents[2]
APP = ROOT / "experiments" / "own_hydra_app" / "app.py"


def test_a_foreign_application_selects_our_estimators(tmp_path):
    options = ["--multirun", "estimator=source,tracin", "epochs=20"]
    status, out, errors = Script(APP, *options, folder=tmp_path).end()
    assert status == 0, errors
    for name in ("Source", "TracIn"):
        assert f"{name}: harmed most by examples 40 (-" in out
    assert len(list(tmp_path.glob("multirun/*/*/*/trajectory/trajectory.h5"))) == 2
