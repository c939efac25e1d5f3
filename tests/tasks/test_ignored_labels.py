"""Labels that the loss ignores, some or all of an example's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.estimators import TracIn
from tests.attributing import quiet
from tests.edits.test_documents import LENGTH, WORDS, Words
from tests.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def rows(*ignored: int) -> list[dict[str, Tensor]]:
    """Texts; those numbered have no label that counts."""
    tokens = torch.randint(WORDS, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    labels = [
        row.new_full((LENGTH,), -100) if n in ignored else row for n, row in enumerate(tokens)
    ]
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def test_all_ignored(tmp_path: Path) -> None:
    """In a training set such an example has no part in anything; as a query it is no question."""
    loader = DataLoader(rows(1), 2)
    trainer(TrajectoryRecorder(tmp_path, num_checkpoints=2)).fit(Words(), loader)
    attribution = AttributionModule(Words(), str(tmp_path), TracIn())
    scores = attribution.attribute(loader, DataLoader(rows(), 2), trainer=quiet())
    assert not scores.values[:, 1].any()
    assert scores.values[:, 0].all()
    with pytest.raises(ValueError, match="Query 2 has no label that counts"):
        attribution.attribute(loader, DataLoader(rows(2), 2), trainer=quiet())
