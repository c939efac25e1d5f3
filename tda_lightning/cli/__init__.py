"""The command line: ``tda train | plan | attribute | check | ...``, Hydra applications."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from tda_lightning.cli.own_classes import import_from_here, with_own_classes

# What each command does, and the setting that a first argument without a name stands for.
COMMANDS: dict[str, tuple[str, str | None]] = {
    "train": ("train a model and record its trajectory", None),
    "plan": ("predict time, memory and disk of what a command would do", "trajectory"),
    "ensemble": ("train more runs like a recorded one, to be attributed together", "trajectory"),
    "attribute": ("score training examples for queries, from a trajectory", "trajectory"),
    "index": ("keep compressed gradients of all examples, to be searched later", "trajectory"),
    "check": ("check that gradients are exact and derivatives can be trusted", "trajectory"),
    "evaluate": ("measure how well scores predict retraining", "trajectory"),
    "unlearn": ("move weights as if some training examples had not been there", "trajectory"),
    "select": ("choose examples of a pool to train on, for the sake of a target", "trajectory"),
    "reweight": ("give every training example a weight, and train again with it", "trajectory"),
    "serve": ("answer over HTTP which training examples caused what a model does", "trajectory"),
    "report": ("write an HTML page that shows a file of scores", "scores"),
    "export": ("write scores as Parquet, CSV or netCDF, for other tools", "scores"),
    "init": ("write a small project to start from, with a module and data of one's own", None),
    "inspect": ("show what is in a trajectory, its size, and whether it is whole", "trajectory"),
}

# `tda plan` takes the settings of `tda train` unless it is given a trajectory.
_PLANS_ATTRIBUTION = ("trajectory=", "-", "help")

# Settings that can be given as flags.
_FLAGS = {("evaluate", "--spot-check"): "spot_check=true"}

USAGE = """\
tda: which training examples caused a prediction, by how much, and when in training.

Usage:
{usage}

For example:
    tda train      experiment=digits
    tda ensemble   runs/digits members=5
    tda plan       trajectory=runs/digits
    tda attribute  trajectory=runs/digits estimator=source
    tda index      runs/digits search=true
    tda check      runs/digits
    tda evaluate   trajectory=runs/digits scores=runs/digits/scores/source.h5
    tda unlearn    runs/digits 'remove=[3,17]'
    tda select     runs/mnli 'pool={num_train: null}' k=10
    tda reweight   runs/digits by=scores scores=runs/digits/scores/source.h5
    tda serve      runs/digits
    tda report     scores=runs/digits/scores/source.h5
    tda export     runs/digits/scores/source.h5 k=50
    tda inspect    runs/digits

Settings are Hydra overrides: `tda COMMAND --help` lists them, `tda COMMAND --cfg job` shows the
configuration, `tda COMMAND --multirun KEY=A,B` runs every combination.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for a failure, 2 for a usage error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if given else 2
    if given[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"tda-lightning {version('tda-lightning')}")
        return 0
    command, *rest = given
    if command == "init":
        from tda_lightning.cli.commands.init import init

        return init(rest)
    if command not in COMMANDS:
        print(
            f"tda: there is no command {command!r}. Commands: {', '.join(COMMANDS)}. "
            "See tda --help.",
            file=sys.stderr,
        )
        return 2
    if command == "plan" and rest[:1] == ["index"]:
        return _run("plan_index", _name_first(command, rest[1:]))
    try:
        given = with_own_classes(rest) if command in ("train", "plan") else rest
    except ValueError as error:
        print(f"tda {command}: {error}", file=sys.stderr)
        return 2
    named = [_FLAGS.get((command, text), text) for text in _name_first(command, given)]
    if command == "plan" and not any(text.startswith(_PLANS_ATTRIBUTION) for text in named):
        return _run("plan_recording", named, settings="train")
    return _run(command, named)


def usage() -> str:
    """The text of ``tda --help``."""
    lines = [f"    tda {name:<10} {does}" for name, (does, _) in COMMANDS.items()]
    return USAGE.replace("{usage}", "\n".join(lines))


def _name_first(command: str, arguments: list[str]) -> list[str]:
    """``tda inspect runs/digits`` means ``tda inspect trajectory=runs/digits``."""
    key = COMMANDS[command][1]
    if key is None or not arguments or arguments[0].startswith("-"):
        return arguments
    if "=" in arguments[0] and not os.path.exists(arguments[0]):
        return arguments
    # Quoted: a path may contain characters of Hydra's grammar.
    quoted = arguments[0].replace("\\", "\\\\").replace("'", "\\'")
    return [f"{key}='{quoted}'", *arguments[1:]]


def _run(command: str, arguments: list[str], settings: str | None = None) -> int:
    """Run the function ``command`` as a Hydra application, configured by ``conf/SETTINGS.yaml``."""
    import hydra

    from hydra_plugins.tda_lightning_searchpath import conf_directory

    import_from_here()
    # One module per command: `tda inspect` waits neither for Lightning nor for the estimators.
    module = import_module(f"tda_lightning.cli.commands.{command.partition('_')[0]}")
    function: Callable[[Any], None] = getattr(module, command)
    application = hydra.main(
        version_base="1.3", config_path=str(conf_directory()), config_name=settings or command
    )(function)
    # hydra.main reads sys.argv; a command run from Python leaves it as it was.
    argv = sys.argv
    sys.argv = [f"tda {command}", *arguments]
    try:
        application()
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, which has no status
            print(f"tda {command}: ended by SIGTERM", file=sys.stderr)
            return 128 + signal.SIGTERM
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ValueError as error:
        # Hydra reports invalid flags this way, before any command has begun.
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"tda {command}: {error}", file=sys.stderr)
        return 2
    finally:
        sys.argv = argv
    return 0
