"""The wheel is whole: installed elsewhere, it runs without the checkout."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing in it but the installed wheel."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    _run(build, folder, {})
    (wheel,) = folder.glob("*.whl")
    target = folder / "target"
    _run(["-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)], folder, {})
    return target


# One process for all of it: importing torch takes longer than the work.
PROGRAM = """
import tda_lightning
from tda_lightning.cli import main
print(tda_lightning.__file__)
tiny = ["data.num_train=60", "data.num_query=3", "trainer.max_epochs=2"]
assert main(["train", "experiment=digits", *tiny]) == 0
assert main(["attribute", "runs/digits", "estimator=tracin"]) == 0
assert main(["report", "runs/digits/scores/tracin.h5"]) == 0
"""


def test_the_command_line_runs_from_the_wheel(installed, tmp_path):
    environment = {"PYTHONPATH": str(installed)}
    script = installed / "bin" / "tda"
    assert "tda attribute" in _run([str(script), "--help"], tmp_path, environment)
    out = _run(["-c", PROGRAM], tmp_path, environment)
    assert Path(out.splitlines()[0]).is_relative_to(installed)
    assert (tmp_path / "runs" / "digits" / "scores" / "tracin.html").stat().st_size > 10_000


def test_the_wheel_holds_what_it_should(installed):
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*")}
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"tda_lightning/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    assert "tda_lightning/py.typed" in names
    assert "hydra_plugins/tda_lightning_searchpath/__init__.py" in names
    assert not [name for name in names if name.startswith(("tests", "experiments"))]


def _run(arguments, folder, environment):
    import os

    # -I would be stricter but hides PYTHONPATH; the working directory is not the checkout.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
