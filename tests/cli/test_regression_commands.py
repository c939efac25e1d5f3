"""``tda select``, ``reweight`` and ``evaluate judge=...`` on a table of numbers with a number to
predict, whose data module scales by its training set."""

import random

import pytest

from tda_lightning.cli import main
from tda_lightning.cli.added_data import pool_from
from tda_lightning.cli.run_config import load_config

TINY = ["experiment=concrete", "data.root=.", "data.num_query=6", "data.num_train=15"]
TINY += ["data.batch_size=5", "model.network.widths=[4]", "trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("table")
    draw = random.Random(0)
    rows = [",".join([*"abcdefgh", "strength"])]
    rows += [",".join(f"{draw.gauss(9, 4):.3f}" for _ in range(9)) for _ in range(41)]
    (path / "uci_concrete").mkdir()
    (path / "uci_concrete" / "concrete.csv").write_text("\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert main(["train", *TINY]) == 0
        assert main(["attribute", "runs/concrete", "estimator=influence"]) == 0
        yield path


def test_a_pool_is_scaled_as_the_training_set_and_its_overlap_is_found(folder, capsys):
    few = ["k=3", "steps=1", "replicas=2"]
    assert main(["select", "runs/concrete", "pool={num_train: null}", *few]) == 0
    out = capsys.readouterr().out
    assert "15 of the 35 examples of the pool are in the training set already" in out
    config = load_config("runs/concrete")
    pool, own = pool_from(config, {}, {"num_train": None}, False), pool_from(config, {}, {}, False)
    rows = {tuple(row.tolist()) for row in pool.dataset.tensors[0]}
    assert len(rows) == 35 and {tuple(row.tolist()) for row in own.dataset.tensors[0]} <= rows


def test_weights_that_do_harm_are_said(folder, capsys):
    scores = ["scores=runs/concrete/scores/influence.h5", "weights=runs/w.csv"]
    assert main(["reweight", "runs/concrete", *scores, "rate=-1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Do not read the predicted change as a size. The scores give ranks only" in said
    assert "made the queries worse on average. Try a smaller rate" in said


def test_numbers_are_no_classes_and_are_judged_in_quarters(folder, capsys):
    assert main(["evaluate", "runs/concrete", "judge=[class]", "baselines=[]"]) == 1
    assert "targets of these data are numbers" in capsys.readouterr().err
    asked = ["judge=[subclass]", "subclass=strength", "k=15", "baselines=[]"]
    assert main(["evaluate", "runs/concrete", *asked]) == 0
    share = float(capsys.readouterr().out.split("influence")[1].split("│")[1])
    assert 0.2 < share < 0.3  # all 15 training examples: as many as are in a quarter of them
    assert main(["reweight", "runs/concrete", "by=columns"]) == 1
    assert "no classes for labels. Use by=scores" in capsys.readouterr().err
