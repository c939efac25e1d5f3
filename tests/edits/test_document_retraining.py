"""Scores of packed documents against training without each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.edits import sum_by_document
from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.evaluation.judgements import slope_and_correlation
from tests.attributing import quiet
from tests.edits.test_documents import LENGTH, WORDS, Words, queries
from tests.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore")

DOCUMENTS, EPOCHS, BATCH = 24, 10, 4


def packed() -> list[dict[str, Tensor]]:
    """Documents of 2 to 5 words, one after another, in rows of one length: some go on in the next
    row."""
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(2, 6, (DOCUMENTS,), generator=generator)
    ids = torch.arange(DOCUMENTS).repeat_interleave(sizes)
    words = torch.randint(WORDS, ids.shape, generator=generator)
    missing = -len(ids) % LENGTH
    ids, words = F.pad(ids, (0, missing), value=-1), F.pad(words, (0, missing))
    pairs = zip(ids.view(-1, LENGTH), words.view(-1, LENGTH), strict=True)
    return [
        {"input_ids": own, "labels": own.where(row >= 0, -100), "example_ids": row}
        for row, own in pairs
    ]


def trained(weights: Tensor, renormalised: bool = False) -> Tensor:
    """The queries' losses after plain training with a weight [document] on the losses of its
    tokens. A mean goes over all of them, or over those that are left."""
    module = Words()
    optimizer = module.configure_optimizers()
    for _ in range(EPOCHS):
        for batch in DataLoader(packed(), BATCH):
            ids = F.pad(batch["example_ids"], (0, 1), value=-1)[:, 1:]
            own = torch.where(ids >= 0, weights[ids.clamp(min=0)], 0.0)
            count = own.sum() if renormalised else (ids >= 0).sum()
            optimizer.zero_grad()
            ((module.token_losses(batch) * own).sum() / count).backward()
            optimizer.step()
    asked = {n: torch.stack([row[n] for row in queries()]) for n in ("input_ids", "labels")}
    return (module.token_losses(asked).sum(1) / (LENGTH - 1)).detach()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    fit = trainer(TrajectoryRecorder(folder, num_checkpoints=6), max_epochs=EPOCHS)
    fit.fit(Words(), DataLoader(packed(), BATCH))
    return folder


@pytest.fixture(scope="module")
def truth() -> Callable[[bool], Tensor]:
    """How the queries' losses rise without each document: [query, document]."""
    ones = torch.ones(DOCUMENTS, dtype=torch.float64)
    without = ones - torch.eye(DOCUMENTS, dtype=torch.float64)

    def changes(renormalised: bool) -> Tensor:
        whole = trained(ones)
        return torch.stack([trained(own, renormalised) - whole for own in without], 1)

    return changes


def predicted(run: Path, estimator: Any) -> Tensor:
    attribution = AttributionModule(Words(), str(run), estimator)
    rows, asked = DataLoader(packed(), BATCH), DataLoader(queries(), 3)
    scores = attribution.attribute(rows, asked, self_influence=False, trainer=quiet())
    if scores.by_token is None:
        return scores.values.double()
    return sum_by_document(scores.by_token, packed()).double()


# Slope and correlation that were found, of training at weight 0 and of training really without.
FOUND = {
    "unrolled": (Unrolled(token_weights=True), (1.128, 0.990), (1.285, 0.930)),
    "SOURCE": (Source(num_segments=3), (1.027, 0.950), (1.115, 0.850)),
    "influence": (InfluenceFunction(), (0.260, 0.738), (0.277, 0.647)),
    "TracIn": (TracIn(), (0.643, 0.916), (0.714, 0.838)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_scores_predict_training_without_a_document(
    name: str, run: Path, truth: Callable[[bool], Tensor]
) -> None:
    estimator, *expected = FOUND[name]
    values = predicted(run, estimator)
    for renormalised, (slope, correlation) in zip((False, True), expected, strict=True):
        found = slope_and_correlation(values, truth(renormalised))
        assert found == pytest.approx((slope, correlation), abs=0.02)
