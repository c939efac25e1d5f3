"""A tokenizer in the collator, which the data set's examples do not show."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.estimators import TracIn
from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.runtime.tokenizers import tokenizer_digests
from tests.attributing import quiet
from tests.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["a b", "b a", "b b", "a a"]


class Tokenizer:
    def __init__(self, words: str) -> None:
        self.words = words
        self.special_tokens_map = {"unk_token": "a"}

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}


def collate(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    vocabulary = tokenizer.get_vocab()
    return torch.tensor([[vocabulary[word] for word in text.split()] for text in texts])


class Next(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(3, 3)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return F.cross_entropy(self.table(batch[:, 0]), batch[:, 1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(words: str) -> DataLoader[Any]:
    made = functools.partial(collate, tokenizer=Tokenizer(words))
    return DataLoader(TEXTS, 2, collate_fn=made)  # type: ignore[arg-type]


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    trainer(TrajectoryRecorder(tmp_path, num_checkpoints=1)).fit(Next(), loader("abc"))
    attribution = AttributionModule(Next(), str(tmp_path), TracIn())
    scores = attribution.attribute(loader("abc"), loader("abc"), trainer=quiet())
    assert scores.values.any()
    with pytest.raises(TrajectoryMismatchError, match="tokenizer of the training set"):
        attribution.attribute(loader("bac"), loader("bac"), trainer=quiet())


def test_tokenizers_are_found_where_they_are_held() -> None:
    own = Tokenizer("abc")

    class Collator:
        def __init__(self) -> None:
            self.tokenizer = own

        def collate(self, texts: list[str]) -> Tensor:
            return collate(texts, self.tokenizer)

    wanted = tokenizer_digests(own)
    assert len(wanted) == 1
    inside = lambda texts: collate(texts, own)  # noqa: E731
    for holder in (
        Collator(),
        Collator().collate,
        functools.partial(collate, tokenizer=own),
        inside,
    ):
        assert tokenizer_digests(holder) == wanted
    assert tokenizer_digests(Tokenizer("acb")) != wanted
    assert tokenizer_digests(TEXTS, None, collate) == []
