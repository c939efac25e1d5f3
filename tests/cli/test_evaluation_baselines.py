"""Which baselines stand beside scores."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.utils.data import TensorDataset

from tda_lightning.cli.evaluation_baselines import baseline, baselines_of
from tda_lightning.evaluation import bm25
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import ClassificationTask, LanguageModelingTask

USUAL = ["random", "self_loss", "last_layer", "gradient_dot"]
TOKENS = torch.tensor([[1, 2, 2], [3, 1, 0], [0, 0, 2]])


class Texts:
    def documents(self, split):
        return [["a", "b"], ["b"], []] if split == "train" else [["b"]]


def run(data=None, task=None, baselines=None):
    sources = [
        ExampleSource.of(TensorDataset(part), 2, "training") for part in (TOKENS, TOKENS[:1])
    ]
    return SimpleNamespace(
        config=SimpleNamespace(baselines=baselines, batch_size=2, seed=0),
        data=data,
        task=task,
        module=None,
        end={},
        train=sources[0],
        queries=sources[1],
    )


def test_text_has_two_more() -> None:
    assert baselines_of(run(task=ClassificationTask())) == USUAL
    assert baselines_of(run(task=LanguageModelingTask())) == [*USUAL, "bm25", "activations"]
    assert baselines_of(run(data=Texts())) == [*USUAL, "bm25", "activations"]
    assert baselines_of(run(data=Texts(), baselines=[])) == []
    assert baselines_of(run(baselines=["bm25"])) == ["bm25"]


def test_words_are_the_data_modules_own_or_the_tokens_of_batches() -> None:
    found = baseline("bm25", run(data=Texts()))
    assert torch.equal(found.values, bm25([["a", "b"], ["b"], []], [["b"]]).values)
    found = baseline("bm25", run(task=LanguageModelingTask()))
    assert torch.equal(found.values, bm25(TOKENS.tolist(), TOKENS[:1].tolist()).values)
