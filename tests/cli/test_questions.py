"""Questions on the command line, from a small text to the report."""

from __future__ import annotations

import dataclasses
import gzip
import random
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tda_lightning import Scores
from tda_lightning.cli import main
from tda_lightning.cli.question import measurement_of, require_harmless, text_positions
from tda_lightning.cli.run_config import build, load_config

CONF = Path(__file__).parents[2] / "conf"
SENTENCES = [
    "the cat sat on the mat",
    "a dog sat on a rug",
    "the dog ran to the cat",
    "a bird saw the cat",
]
TINY = [
    "experiment=wikitext2_gpt",
    "name=text",
    "data.root=.",
    "data.sequence_length=6",
    "data.vocabulary_size=16",
    "data.num_train=12",
    "data.num_query=2",
    "data.min_count=1",
    "data.batch_size=4",
    "model.network.width=8",
    "model.network.depth=1",
    "model.network.heads=2",
    "trainer.max_epochs=2",
    "recorder.num_checkpoints=2",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with runs/text, a GPT trained on a few words."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "wikitext2").mkdir()
    choose = random.Random(0).choice
    for part in ("valid", "test"):
        with gzip.open(folder / "wikitext2" / f"wiki.{part}.tokens.gz", "wt") as file:
            file.writelines(f"{choose(SENTENCES)}\n" for _ in range(40))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", *TINY]) == 0
        yield folder / "runs" / "text"


@pytest.fixture(autouse=True)
def inside(run, monkeypatch):
    monkeypatch.chdir(run.parent.parent)


def ask(*settings):
    return main(["attribute", "runs/text", "estimator=tracin", *settings])


def test_a_contrast_of_words_and_its_report(run):
    settings = ("measurement=contrast", "measurement.target=cat", "measurement.foil=dog")
    scores = "scores=runs/text/scores/contrast.h5"
    assert ask(*settings, "measurement.positions=-1", scores, "by_token=both") == 0
    found = Scores.load(run / "scores" / "contrast.h5")
    words = build(load_config(run).data, False)
    words.setup()
    cat, dog = words.vocabulary.index("cat"), words.vocabulary.index("dog")
    assert found.provenance["measurement"] == {
        "quantity": f"the probability of class {cat} minus that of class {dog} at the last "
        "position",
        "sign": -1,
    }
    assert found.by_query_token.shape == (2, 6, 12)
    assert not bool(found.by_query_token[:, :5].any())
    assert torch.allclose(found.by_query_token[:, 5], found.values, rtol=1e-3)
    assert torch.allclose(found.by_token.sum(2), found.values, rtol=1e-3, atol=1e-9)
    assert main(["report", "scores=runs/text/scores/contrast.h5"]) == 0
    page = (run / "scores" / "contrast.html").read_text(encoding="utf-8")
    assert "removing one is predicted to lower the probability of class" in " ".join(page.split())
    assert 'class="token' in page


def test_retrained_models_are_measured_as_the_scores_were_asked(run, capsys):
    scores = "scores=runs/text/scores/span.h5"
    assert ask("measurement=log_probability", "measurement.span=[1,3]", scores) == 0
    command = ["evaluate", "runs/text", scores, "num_subsets=3", "baselines=[random]"]
    assert main(command) == 0
    assert list((run / "ground_truth").glob("single_run-0.5-0-*.h5"))
    assert main([*command, "protocol=pbrf", "damping=1"]) == 1
    assert "Evaluate them by retraining on subsets" in capsys.readouterr().err


def test_a_pool_that_overlaps_is_said(run, capsys):
    scores = "scores=runs/text/scores/pool.h5"
    assert ask("pool={subset_seed: 1}", scores) == 0
    said = capsys.readouterr().out
    assert "12 examples of the pool for 2 queries" in said
    record = Scores.load(run / "scores" / "pool.h5").provenance["pool"]
    assert record["size"] == 12
    assert f"{record['in_training']} of the 12 examples of the pool are in the training" in said
    assert main(["report", "scores=runs/text/scores/pool.h5"]) == 0
    page = " ".join((run / "scores" / "pool.html").read_text(encoding="utf-8").split())
    assert "Would help most" in page
    assert "adding one is predicted to lower the measurement" in page
    assert "is training example" in page
    assert ask("pool={split: test}", "scores=x.h5") == 1
    assert "pool.split must be train or query, got 'test'" in capsys.readouterr().err


WRONG = {
    "measurement=contrast": "This measurement needs measurement.foil=..., got none",
    "measurement=probability measurement.target=zebra": "'zebra' is not among the",
    "measurement=loss measurement.span=[4,9]": "Position 6 lies outside of query 0",
    "measurement=loss measurement.text=zebra": "Query 0 does not hold 'zebra'",
    "by_token=words": "by_token must be 'train'",
    "pool=3": "pool must be settings by name",
}


@pytest.mark.parametrize("settings", WRONG)
def test_what_cannot_be_asked_is_refused_in_words(settings, capsys):
    assert ask(*settings.split(), "scores=x.h5") == 1
    assert WRONG[settings] in capsys.readouterr().err


NEEDED = {
    "contrast": {"foil": 1},
    "reward": {"rewards": [1.0, 2.0]},
    "function": {"function": "torch.nn.functional.relu"},
    "of_outputs": {"function": "torch.nn.functional.relu"},
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "measurement").glob("*")))
def test_each_file_makes_its_measurement_and_names_its_settings(name):
    node = OmegaConf.load(CONF / "measurement" / f"{name}.yaml")
    named = {key for key in node if key != "_target_"}
    made = measurement_of(OmegaConf.merge(node, NEEDED.get(name, {})), None)
    positions = {"text"} if "span" in named else set()
    assert {field.name for field in dataclasses.fields(made)} | positions == named
    if name in NEEDED:
        (missing,) = NEEDED[name]
        with pytest.raises(ValueError, match=rf"needs measurement\.{missing}=\.\.\., got none"):
            measurement_of(node, None)


def test_words_of_a_text_are_found(run):
    data = build(load_config(run).data, False)
    data.setup()
    words = [piece.strip() for piece, _ in data.render("query", 0).pieces]
    asked = next(
        word
        for word in words[1:]
        if all(word in [p.strip() for p, _ in data.render("query", q).pieces][1:] for q in (0, 1))
        and word
    )
    for query, positions in enumerate(text_positions(asked, data)):
        pieces = data.render("query", query).pieces
        assert [text.strip() for text, place in pieces if place in positions] == [asked]
    node = OmegaConf.create(
        {"_target_": "tda_lightning.measurements.Loss", "text": asked, "target": None}
    )
    assert measurement_of(node, data).positions == text_positions(asked, data)


def test_a_file_of_scores_runs_no_code_of_others():
    ours = {"_target_": "tda_lightning.measurements.Loss", "span": [1, 2]}
    require_harmless(ours, trust=False)
    for wrong in (
        {"_target_": "os.system"},
        {"_target_": "tda_lightning.measurements.base.importlib.import_module"},
        {**ours, "outputs": "os.system"},
        {"_target_": "tda_lightning.measurements.Function", "function": "os.system"},
    ):
        with pytest.raises(ValueError, match="runs code from outside this library"):
            require_harmless(wrong, trust=False)
        require_harmless(wrong, trust=True)
