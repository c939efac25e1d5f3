"""Every file in conf/ composes, and what it describes can be made."""

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf"
COMMANDS = (
    "train",
    "ensemble",
    "plan",
    "attribute",
    "check",
    "evaluate",
    "unlearn",
    "report",
    "inspect",
)
COMMANDS += ("export", "select", "serve", "reweight", "index", "plan_index")
GROUPS = {
    "train": ("data", "model", "task", "optimizer", "scheduler", "trainer", "recorder"),
    "attribute": ("estimator", "task", "solver"),
}
CHOICES = [
    (command, group, path.stem)
    for command, groups in GROUPS.items()
    for group in groups
    for path in sorted((CONF / group).glob("*.yaml"))
    if path.stem != "own"  # one's own classes: test_own_classes.py
]
# Models that take sizes from their data set.
DATA = {
    "wikitext2_gpt": "wikitext2",
    "gpt2_lora": "wikitext2",
    "mnli_encoder": "mnli",
    "mnli_pretrained": "mnli",
    "cifar10_diffusers": "cifar10_outliers",
}
FILES = (path.relative_to(CONF / "experiment") for path in (CONF / "experiment").rglob("*.yaml"))
EXPERIMENTS = sorted(path.with_suffix("").as_posix() for path in FILES)


def make(command, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, list(overrides))


def test_no_file_is_left_out():
    tested = {f"{group}/{name}" for _, group, name in CHOICES}
    # Words in their settings are looked up in the data: test_questions.py.
    tested |= {f"measurement/{path.stem}" for path in (CONF / "measurement").glob("*.yaml")}
    tested |= {f"experiment/{name}" for name in EXPERIMENTS} | {*COMMANDS, "common"}
    tested |= {"data/own", "model/own"}  # test_own_classes.py
    files = {path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml")}
    assert files == tested


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    assert make(command)


@pytest.mark.parametrize(("command", "group", "name"), CHOICES)
def test_choices_can_be_made_and_name_every_argument(command, group, name):
    config = make(command, f"{group}={name}", *([f"data={DATA[name]}"] if name in DATA else []))
    require_every_argument(group, config[group])
    if name == "mnli_pretrained":  # with a checkpoint: test_pretrained.py
        with pytest.raises(InstantiationException, match=r"data\.tokenizer=FOLDER"):
            instantiate(config[group], _convert_="all")
        return
    if name == "cifar10_diffusers":
        pytest.importorskip("diffusers")
    if name == "gpt2_lora":
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    made = instantiate(config[group], _convert_="all")
    if (group, name) != ("task", "none"):
        assert made is not None


def require_every_argument(group, node):
    """A reader finds the options in the file: all of ours are there, none that do not exist."""
    target = node and node.get("_target_", "")
    if not target or not target.startswith("tda_lightning."):
        return
    parameters = inspect.signature(get_object(target)).parameters
    given = {key for key in node if not key.startswith("_")}
    skipped = {"optimizer", "total_steps", "options"} if group == "scheduler" else {"options"}
    assert set(parameters) - skipped <= given
    if "options" not in parameters:
        assert given <= set(parameters)


def test_a_solver_is_the_influence_functions():
    from tda_lightning.solvers import ConjugateGradients

    def influence(*overrides):
        config = make("attribute", "estimator=influence", *overrides)
        return instantiate(config.estimator, _convert_="all")

    assert influence().solver is None
    solver = influence("solver=cg", "solver.tolerance=1e-6").solver
    assert isinstance(solver, ConjugateGradients)
    assert solver.tolerance == 1e-6
    planned = make("plan", "solver=cg").estimators.influence
    assert isinstance(instantiate(planned, _convert_="all").solver, ConjugateGradients)
    assert instantiate(make("plan").estimators.influence, _convert_="all").solver is None


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_can_be_made(name, tmp_path):
    config = make("train", f"experiment={name}", f"output={tmp_path / 'run'}")
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if name == "gpt2_lora":
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    data, module = instantiate(config.data), instantiate(config.model, _convert_="all")
    assert data.batch_size == config.data.batch_size
    assert sum(parameter.numel() for parameter in module.parameters()) > 1000
    optimizer = module._optimizer(module.parameters())
    module._scheduler(optimizer, 100)
    assert 0 < optimizer.param_groups[0]["lr"] <= config.optimizer.lr
    assert instantiate(config.recorder).path == tmp_path / "run"
    assert instantiate(config.trainer).max_epochs == config.trainer.max_epochs
    assert not list(tmp_path.iterdir())
