"""From a pool to another training: ``tda select``, ``tda train extra=FILE``."""

import csv
import json

import pytest
import torch
from omegaconf import OmegaConf

from tda_lightning import Scores, Trajectory
from tda_lightning.cli import main
from tda_lightning.cli.edited_data import as_trained
from tda_lightning.cli.run_config import build, load_config
from tda_lightning.edits import Removal, save_edits
from tda_lightning.examples.data import MNLIData
from tests.cli.made_up_pairs import TINY, write_pairs

SMALL = ["steps=2", "replicas=2", "anchors=3", "k=2", "estimator.curvature=identity"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_pairs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pairs(count):
    settings = {"min_count": 1, "sequence_length": 8}
    return MNLIData(root=".", holdout=6, num_query=None, num_train=count, **settings)


def test_from_a_pool_to_another_training(folder, capsys):
    assert main(["train", *TINY]) == 0
    pool = "pool={num_train: 40}"
    assert main(["select", "runs/pairs", pool, *SMALL]) == 0
    out = capsys.readouterr().out
    assert "20 of the 40 examples of the pool are in the training set already" in out
    assert "tda train ... extra=runs/pairs/selection.json" in out
    with open("runs/pairs/selection.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    written = json.loads((folder / "runs/pairs/selection.json").read_text(encoding="utf-8"))
    chosen = written["chosen"]
    assert {int(row["index"]) for row in rows} == set(chosen)
    assert written["pool"] == {"num_train": 40}
    whole = pairs(40).train_dataset
    labels = {int(row["index"]): int(row["label"]) for row in rows}
    assert all(int(whole[index][1]) == label for index, label in labels.items())
    assert main(["select", "runs/pairs", pool, *SMALL]) == 1
    assert "overwrite=true" in capsys.readouterr().err
    target = ["target={split: train}", "selection=runs/other", "estimator=tracin"]
    assert main(["select", "runs/pairs", pool, *SMALL[:4], *target]) == 0
    assert (folder / "runs/other.json").exists()

    # With other examples dropped; it is remembered when the files are gone.
    save_edits([Removal(0)], "edits.json", num_train=20)
    extra = ["drop=edits.json", "extra=runs/pairs/selection.json", "output=runs/second"]
    assert main(["train", *TINY, *extra]) == 0
    assert f"with {len(chosen)} extra examples" in capsys.readouterr().out
    (folder / "runs/pairs/selection.json").unlink()
    count = 19 + len(chosen)
    assert Trajectory.load("runs/second").facts.num_examples == count
    config = load_config("runs/second")
    data = as_trained(config, build(config.data, False))
    assert len(data.train_dataset) == count == len(data.train_dataloader().dataset)
    for place, index in enumerate(chosen, start=19):
        assert torch.equal(data.train_dataset[place][0], whole[index][0])
    assert data.render("train", 19).caption.startswith("extra: ")
    own = pairs(20)
    assert data.render("train", 0).caption == own.render("train", 1).caption
    assert data.train_dataset.labels == [int(data.train_dataset[n][1]) for n in range(count)]
    assert main(["attribute", "runs/second", "estimator=tracin"]) == 0
    assert Scores.load("runs/second/scores/tracin.h5").num_train == count
    assert main(["report", "runs/second/scores/tracin.h5"]) == 0
    # The pool of this run is not what training added or left out.
    assert main(["attribute", "runs/second", "estimator=tracin", "pool={num_train: 20}"]) == 0
    assert "19 of the 20 examples of the pool" in capsys.readouterr().out


def test_a_pool_may_name_settings_that_training_did_not():
    """The configuration of ``tda train`` is closed to other keys."""
    target = {"_target_": "tda_lightning.examples.data.MNLIData", "root": "${root}"}
    config = OmegaConf.create({"root": "here", "data": target})
    OmegaConf.set_struct(config, True)
    made = build(config.data, False, holdout=6)
    assert (made.holdout, made.root) == (6, "here")
    assert "holdout" not in config.data


@pytest.mark.slow
def test_candidates_by_an_index_in_place_of_features(folder):
    assert main(["train", *TINY]) == 0
    small = ["estimator=tracin", "bytes_per_example=64"]
    assert main(["index", "runs/pairs", *small, "append={num_train: 40}"]) == 0
    by_index = ["index=runs/pairs/index/tracin", "estimator=tracin"]
    assert main(["select", "runs/pairs", "pool={num_train: 40}", *SMALL[:4], *by_index]) == 0
    assert (folder / "runs/pairs/selection.json").exists()


def test_files_and_pools_that_do_not_fit(folder, capsys):
    content = {"format": "tda-lightning selection", "version": 1, "pool": {"num_train": 30}}
    (folder / "a.json").write_text(json.dumps({**content, "num_pool": 70, "chosen": [3]}))
    assert main(["train", *TINY, "extra=a.json"]) == 1
    assert "chosen from a pool of 70" in capsys.readouterr().err
    assert main(["train", *TINY, "extra=b.json"]) == 1
    assert "There is no file b.json" in capsys.readouterr().err
    assert main(["train", *TINY]) == 0
    assert main(["select", "runs/pairs"]) == 1
    assert "Expected pool, got none" in capsys.readouterr().err
    assert main(["select", "runs/pairs", "pool=40"]) == 1
    assert "pool must be settings by name" in capsys.readouterr().err
    assert main(["select", "runs/pairs", "pool={split: middle}"]) == 1
    assert "pool.split must be train or query" in capsys.readouterr().err
    assert main(["select", "runs/pairs", "pool={num_train: 20}"]) == 1
    assert "nothing new to choose" in capsys.readouterr().err
