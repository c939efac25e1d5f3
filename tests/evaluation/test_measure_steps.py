"""Queries measured by a module's own step: each over its own terms, whatever batch it comes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tda_lightning.evaluation import measure

LENGTHS = [3, 5, 2, 4, 6, 3, 5]
WORDS = 9


class Sentences(Dataset[Tensor]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(1, WORDS, (n,), generator=generator) for n in LENGTHS]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return {"input_ids": ids, "labels": labels}


class Reader(nn.Module):
    def __init__(self, reduce: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(WORDS, 4), nn.Linear(4, WORDS)
        self.double()
        self.reduce = reduce

    def losses(self, ids: Tensor, labels: Tensor) -> Tensor:
        outputs = self.head(self.embedding(ids).cumsum(1).tanh())[:, :-1]
        return F.cross_entropy(outputs.movedim(-1, 1), labels[:, 1:], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(batch["input_ids"], batch["labels"])
        counted = batch["labels"][:, 1:] != -100
        if self.reduce == "number":
            return losses.sum() / int(counted.sum())
        if self.reduce == "chosen":
            return losses[counted].mean()
        return (losses * counted).sum() / counted.sum()


@pytest.mark.parametrize("reduce", ["number", "chosen", "mask"])
def test_a_sentence_is_measured_per_token_of_its_own(reduce: str) -> None:
    module, data = Reader(reduce), Sentences()
    own = [module.losses(row[None], row[None]).mean() for row in data.rows]
    for size in (1, 3, 7):
        loader = DataLoader(data, size, collate_fn=padded)
        found = measure(module, None, module.state_dict(), loader)
        torch.testing.assert_close(found, torch.stack(own).detach())
