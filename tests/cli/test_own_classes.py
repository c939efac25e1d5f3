"""One's own module and data on the command line, without a word about them in this library."""

import importlib
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.cli import main
from tda_lightning.cli.own_classes import with_own_classes
from tda_lightning.cli.own_config import read_own_config
from tda_lightning.estimators import Source
from tests.attributing import quiet, relative

ROOT = Path(__file__).parents[2]
PACKAGE = "own_attribution_project"  # a name that no other module has
QUICK = ["trainer.max_epochs=2", "data.num_train=40"]
OWN = [f"module={PACKAGE}.model.Net", f"data={PACKAGE}.data.Points"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working directory, which holds what ``tda init`` writes, as a package."""
    monkeypatch.chdir(tmp_path)
    assert main(["init", PACKAGE]) == 0
    (tmp_path / PACKAGE / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def test_a_project_from_init_to_the_report(project, capsys):
    assert main(["train", *OWN, *QUICK, "module.width=8"]) == 0
    config = OmegaConf.load("runs/net/config.yaml")
    # Nothing of our own examples has been merged into it.
    assert config.data == {"_target_": f"{PACKAGE}.data.Points", "num_train": 40}
    assert config.model == {"_target_": f"{PACKAGE}.model.Net", "width": 8}
    assert config.task is None and "optimizer" not in config
    assert main(["attribute", "runs/net"]) == 1
    assert "add trust_config=true" in capsys.readouterr().err
    command = ["attribute", "runs/net", "trust_config=true", "self_influence=true"]
    assert main([*command, "data.num_query=3"]) == 0
    scores = Scores.load("runs/net/scores/source.h5")
    assert scores.values.shape == (3, 40)

    package = (
        importlib.import_module(f"{PACKAGE}.data"),
        importlib.import_module(f"{PACKAGE}.model"),
    )
    data, module = package[0].Points(num_train=40), package[1].Net(8)
    attribution = AttributionModule(module, "runs/net", Source())
    expected = attribution.attribute(data, data.val, trainer=quiet()).values[:3]
    assert relative(scores.values, expected) < 1e-6

    assert main(["report", "runs/net/scores/source.h5", "trust_config=true"]) == 0
    assert Path("runs/net/scores/source.html").is_file()
    assert main(["plan", "runs/net", "estimator=tracin", "trust_config=true"]) == 0
    assert main(["plan", *OWN, "trainer.max_epochs=2"]) == 0
    capsys.readouterr()
    assert (
        main(["attribute", "runs/net", "trust_config=true", "scores=t.h5", "data.queries=test"])
        == 1
    )
    assert "test_dataloader" in capsys.readouterr().err
    assert not Path("t.h5").exists()


CLI_CONFIG = """\
seed_everything: 3
trainer:
  accelerator: cpu
  max_epochs: 2
  enable_progress_bar: null
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: tda_lightning.TrajectoryRecorder
      init_args: {path: elsewhere}
model:
  class_path: PACKAGE.model.Net
  init_args: {width: 8}
data:
  class_path: PACKAGE.data.Points
  init_args: {num_train: 40}
optimizer:
  class_path: torch.optim.Adam
  init_args: {lr: 0.01}
lr_scheduler:
  class_path: torch.optim.lr_scheduler.ExponentialLR
  init_args: {gamma: 0.5}
ckpt_path: null
"""


def test_a_configuration_of_lightning_cli(project, capsys):
    Path("lightning.yaml").write_text(CLI_CONFIG.replace("PACKAGE", PACKAGE))
    train = ["train", "config=lightning.yaml", "output=runs/cli"]
    assert main([*train, "module.width=4", "trainer.max_epochs=3"]) == 0
    assert not Path("elsewhere").exists()
    trajectory = Trajectory.load("runs/cli")
    assert trajectory.facts.optimizer == "Adam" and trajectory.num_steps == 6
    assert trajectory.steps.learning_rate[:, 0].tolist() == [0.01] * 2 + [0.005] * 2 + [0.0025] * 2
    assert trajectory.facts.parameters["network.0.weight"].shape == (4, 2)
    assert OmegaConf.load("runs/cli/config.yaml").seed == 3
    assert main(["attribute", "runs/cli", "trust_config=true", "estimator=tracin"]) == 0
    # A run without a configuration of ours, as LightningCLI itself leaves it.
    Path("runs/cli/config.yaml").unlink()
    Path("own.yaml").write_text(Path("lightning.yaml").read_text().replace("width: 8", "width: 4"))
    given = ["runs/cli", "config=own.yaml", "estimator=tracin"]
    assert main(["attribute", *given, "scores=again.h5"]) == 0
    again = Scores.load("again.h5").values
    assert torch.equal(again, Scores.load("runs/cli/scores/tracin.h5").values)
    capsys.readouterr()
    assert main(["attribute", "runs/cli", "estimator=tracin", "scores=new.h5"]) == 1
    assert "add config=FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_an_application_in_the_shape_of_the_template(tmp_path, monkeypatch):
    """Trained by its own script, attributed from its own configuration."""
    app = tmp_path / "app"
    shutil.copytree(ROOT / "experiments" / "lightning_template", app)
    # A package named src may be there already.
    (app / "src").rename(app / "src_of_template")
    for file in (*app.rglob("*.yaml"), *app.rglob("*.py")):
        file.write_text(file.read_text().replace("src.", "src_of_template."))
    monkeypatch.chdir(app)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["train", "hydra.run.dir=runs/points", "trainer.max_epochs=3"])
    runpy.run_path(str(app / "src_of_template" / "train.py"), run_name="__main__")
    config = "config=runs/points/.hydra/config.yaml"
    command = ["attribute", "runs/points/trajectory", config]
    assert main([*command, "self_influence=true", "ckpt=best", "scores=scores.h5"]) == 0
    scores = Scores.load("scores.h5")
    assert scores.values.shape == (50, 200)
    suspects = scores.self_influence.argsort(descending=True)[:20]
    assert np.isin(suspects.numpy(), np.arange(10)).sum() >= 5
    for name in [n for n in sys.modules if n.startswith("src_of_template")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["train", "module=my.Net"], 2, "add data=my.Data"),
        (["train", "data=my.Data"], 2, "add module=my.Module"),
        (["train", "module=my.Net", "data=my.Data"], 1, "my"),
        (["train", "config=nowhere.yaml"], 1, "There is no configuration at nowhere.yaml"),
        (["init", "a", "b"], 2, "expected a folder, got a b"),
        (["init", "."], 1, "is not empty"),
    ],
)
def test_wrong_calls_are_answered_in_words(command, status, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("there.txt").touch()
    assert main(command) == status
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_configuration_without_classes_is_refused(tmp_path):
    for text, said in (
        ("model: {width: 3}", "does not name the class of the model"),
        ("model: {class_path: a.B}\ndata: {size: 1}", "does not name the class of the data"),
        ("[1, 2]", "is a list"),
        ("model: ${nowhere}", "cannot be read"),
        ("a: [", "cannot be read"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_own_config(tmp_path / "config.yaml")


def test_other_arguments_stay():
    given = ["experiment=digits", "data.num_train=3", "optimizer.lr=0.1"]
    assert with_own_classes(given) == given
    assert with_own_classes(
        ["module=a.B", "data=c.D", "task=classification", "optimizer=adam"]
    ) == [
        "model=own",
        "data=own",
        "++model._target_=a.B",
        "++data._target_=c.D",
        "~scheduler",
        "name=b",
        "task=classification",
        "optimizer=adam",
    ]
