"""Hugging Face checkpoints, on a tiny one that is made and saved here."""

from __future__ import annotations

import functools
import json
import shutil
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.cli.run_config import build
from tda_lightning.estimators import Source
from tda_lightning.examples.data import MNLIData
from tda_lightning.examples.models import Classifier, Pretrained
from tda_lightning.examples.models.pretrained import encode_pairs, load_model, load_tokenizer
from tda_lightning.tasks import ClassificationTask
from tests.attributing import quiet
from tests.cli.test_config import CONF
from tests.examples.test_pairs import root  # noqa: F401

CLASSES = [["entailment"], ["neutral", "contradiction"]]
LABELS = {0: "contradiction", 1: "neutral", 2: "entailment"}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "the", "cat", "dog", "and", "ran", "sat", "saw"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a BERT of one block and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "own")


PREMISES, HYPOTHESES = ["The cat sat and the dog ran", "A dog slept"], ["A cat sat", "A dog moved"]


def test_logits_are_those_of_transformers(saved):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertForSequenceClassification.from_pretrained(saved).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    given = tokenizer(PREMISES, HYPOTHESES, padding=True, return_tensors="pt")
    expected = theirs(**given).logits
    inputs = encode_pairs(load_tokenizer(str(saved)), PREMISES, HYPOTHESES, 14)
    assert inputs.shape == (2, 3, 14)
    torch.testing.assert_close(Pretrained(str(saved)).eval()(inputs), expected)
    # In classes of several labels, probabilities add up.
    merged = Pretrained(str(saved), CLASSES).eval()(inputs).softmax(1)
    apart = expected.softmax(1)
    torch.testing.assert_close(merged, torch.stack([apart[:, 2], apart[:, 0] + apart[:, 1]], 1))


def test_the_model_is_ready_to_train(folder):
    """Whatever precision it was saved in, and though transformers gives it in eval mode."""
    transformers = pytest.importorskip("transformers")
    half = transformers.BertForSequenceClassification.from_pretrained(folder).half()
    half.save_pretrained(folder)
    model = load_model(str(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(part.training for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_fine_tuned_checkpoint_is_attributed(saved, root, tmp_path):  # noqa: F811
    """As configured by model=mnli_pretrained, against plain autograd."""
    overrides = ["data=mnli", "model=mnli_pretrained", "optimizer=adamw", f"data.tokenizer={saved}"]
    overrides += [f"data.root={root}", "data.holdout=2", "data.num_query=null", "data.batch_size=2"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*overrides, "data.sequence_length=14"])
    data = instantiate(config.data, _convert_="all")
    module = build(config.model, trust=False)
    assert isinstance(data, MNLIData) and isinstance(module, Classifier)
    module._optimizer = functools.partial(torch.optim.AdamW, lr=0.001)
    recorder = TrajectoryRecorder(tmp_path / "run", num_checkpoints=3)
    quiet(max_epochs=3, callbacks=[recorder]).fit(module, data)
    attribution = AttributionModule(module, str(tmp_path / "run"), Source(), ClassificationTask())
    errors = attribution.check(data.train_dataset, data.query_dataset)
    assert max(errors.values()) < 1e-4
    scores = attribution.attribute(data.train_dataset, data.query_dataset, trainer=quiet())
    assert scores.values.shape == (2, 3)
    assert scores.values.isfinite().all() and bool(scores.values.any())
    assert data.render("train", 0).text.startswith("Premise: ")


@pytest.mark.parametrize(
    ("classes", "got"),
    [
        ([["entailment"], ["neutral"]], "neutral"),
        ([["ENTAILMENT"], ["neutral", "contradiction"]], "ENTAILMENT"),
        ([["entailment", "neutral"], ["neutral", "contradiction"]], "neutral"),
        ([["entailment", "neutral", "contradiction"], []], r"\[\]"),
    ],
)
def test_classes_are_made_of_the_checkpoints_own_labels(saved, classes, got):
    message = f"has the labels contradiction, neutral, entailment. .* got .*{got}"
    with pytest.raises(ValueError, match=message):
        Pretrained(str(saved), classes)


def test_inputs_of_another_vocabulary_are_refused(saved):
    with pytest.raises(ValueError, match=r"input_ids, token_type_ids, attention_mask, got .*2, 14"):
        Pretrained(str(saved))(torch.zeros(2, 14, dtype=torch.int64))


def test_weights_that_are_pickled_are_not_read(folder):
    weights = load_model(str(folder)).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors. .* pickles"):
        Pretrained(str(folder))


def test_a_checkpoint_without_a_head_is_refused(folder):
    transformers = pytest.importorskip("transformers")
    transformers.BertModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"no weights for classifier\.bias, classifier\.weight"):
        Pretrained(str(folder))


def test_code_in_the_folder_is_not_run(folder):
    """The checkpoint's own class is asked for, and refused."""
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        "AutoConfig": "own.Config",
        "AutoModelForSequenceClassification": "own.Model",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        Pretrained(str(folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", "holds no config.json"), ("tokenizer.json", "holds no tokenizer.json")],
)
def test_missing_files_are_named(folder, file, message):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        Pretrained(str(folder))


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="Expected the folder of a Hugging Face .* got None"):
        Pretrained(None)
    with pytest.raises(FileNotFoundError, match="is no folder. .* nothing is downloaded"):
        Pretrained(str(tmp_path / "bert-base-uncased"))


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ImportError, match=r"pip install 'tda-lightning\[huggingface\]'"):
        load_tokenizer(str(tmp_path))
