"""`tda serve` finds the index of a run, or says what to do."""

import pytest
from hydra import compose, initialize_config_dir

from hydra_plugins.tda_lightning_searchpath import conf_directory
from tda_lightning import cli
from tda_lightning.cli.commands import plan as plan_command
from tda_lightning.cli.commands.serve import _index_folder
from tda_lightning.cli.setting_types import require_setting_types
from tda_lightning.store.layout import INDEX_FILE


def test_the_only_index_of_a_run_is_served(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no index.*tda index .*index=FOLDER"):
        _index_folder(tmp_path, None)
    assert _index_folder(tmp_path, "elsewhere").name == "elsewhere"
    for name in ("source", "tracin"):
        folder = tmp_path / "index" / name
        folder.mkdir(parents=True)
        (folder / INDEX_FILE).touch()
        if name == "source":
            assert _index_folder(tmp_path, None) == folder
    with pytest.raises(ValueError, match=r"2 indices.*source.*tracin"):
        _index_folder(tmp_path, None)


def test_the_plan_of_an_index_takes_a_folder_first(monkeypatch):
    """``tda plan index FOLDER`` is a command of its own, whose settings have their types."""
    asked = []

    def run(command, arguments, settings=None):
        asked.append((command, arguments))
        return 0

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["plan", "index", "runs/x", "num_examples=1000000000"]) == 0
    assert asked == [("plan_index", ["trajectory='runs/x'", "num_examples=1000000000"])]
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        for command in ("index", "plan_index", "serve"):
            require_setting_types(compose(command, ["trajectory=runs/x", "data.queries=test"]))
        with pytest.raises(TypeError, match="num_examples"):
            require_setting_types(compose("plan_index", ["trajectory=x", "num_examples=many"]))


def test_the_plan_of_an_index_is_that_of_the_command(monkeypatch):
    """Neither chooses the form of the rows by the recorded queries."""
    asked = {}
    for name in ("load_recorded", "run_configuration", "run_folder", "AttributionModule"):
        monkeypatch.setattr(plan_command, name, lambda *given: None)
    for name in ("instantiate", "index_plan_table", "configured_trainer"):
        monkeypatch.setattr(plan_command, name, lambda *given, **more: "")
    monkeypatch.setattr(plan_command, "load_parts", lambda *given: (None, None, None))
    monkeypatch.setattr(plan_command, "sources", lambda *given: ("train", "queries"))
    monkeypatch.setattr(plan_command, "planned_index", lambda *given, **more: asked.update(more))
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        plan_command.plan_index(compose("plan_index", ["trajectory=runs/x", "threads=null"]))
    assert asked["bytes_per_example"] == 1024
    assert asked.get("queries") is None
