"""Rows of several documents: columns are documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.edits import Removal, document_removals, sum_by_document
from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.records.errors import UnsupportedTrainingError
from tests.attributing import quiet, relative
from tests.oracles.unrolling import UPDATES
from tests.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS, LENGTH, RATE, STEPS = 7, 6, 0.2, 4
ADAMW_RATE, BETAS, DECAY = 0.05, (0.8, 0.9), 0.1
# Document 1 goes on in the next row; the last row is padded.
IDS = [[0, 0, 0, 1, 1, 1], [1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 4, 4], [5, 5, 5, -1, -1, -1]]


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for ids in torch.tensor(IDS):
        tokens = torch.randint(WORDS, (LENGTH,), generator=generator)
        labels = tokens.where(ids >= 0, -100)
        out.append({"input_ids": tokens, "labels": labels, "example_ids": ids})
    return out


class Words(LightningModule):
    """Predicts the next word from the present one and the mean of all before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(WORDS, 5), nn.Linear(5, WORDS)
        self.double()

    def token_losses(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.words(batch["input_ids"])
        before = hidden.cumsum(1) / torch.arange(1, LENGTH + 1)[:, None]
        logits = self.head((hidden + before).tanh())
        labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        hidden = self.words(batch["input_ids"])
        before = hidden.cumsum(1) / torch.arange(1, LENGTH + 1)[:, None]
        logits = self.head((hidden + before).tanh())
        labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.reshape(-1, WORDS), labels.reshape(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), RATE)


class ByAdamW(Words):
    """The same by AdamW."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), ADAMW_RATE, BETAS, weight_decay=DECAY)


def loader(given: list[Any], size: int = 2) -> DataLoader[Any]:
    return DataLoader(given, size)


def record(folder: Path, module: LightningModule | None = None) -> None:
    recorder = TrajectoryRecorder(folder, num_checkpoints=2)
    trainer(recorder).fit(module or Words(), loader(rows()))


def queries() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(WORDS, (3, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def attribute(folder: Path, estimator: Any, given: list[Any] | None = None, **options: Any):
    module = AttributionModule(Words(), str(folder), estimator)
    train = rows() if given is None else given
    options = {"self_influence": False, "trainer": quiet(), **options}
    return module.attribute(loader(train), loader(queries()), **options)


def shifted_ids() -> Tensor:
    """The document of each token's loss."""
    return F.pad(torch.tensor(IDS), (0, 1), value=-1)[:, 1:]


@pytest.mark.parametrize("estimator", [TracIn(), InfluenceFunction(), Source(num_segments=2)])
def test_documents_of_a_row_make_up_the_row(tmp_path: Path, estimator: Any) -> None:
    record(tmp_path)
    documents = attribute(tmp_path, estimator)
    assert documents.values.shape == (3, 6)
    removals = [Removal(n) for n in range(len(IDS))]
    wanted = attribute(tmp_path, estimator, edits=removals).values
    first = documents.values[:, 0] + documents.values[:, 1] + documents.values[:, 2]
    assert relative(first, wanted[:, 0] + wanted[:, 1]) < 1e-6
    assert relative(documents.values[:, 3:5].sum(1), wanted[:, 2]) < 1e-6
    assert relative(documents.values[:, 5], wanted[:, 3]) < 1e-6


def test_tracin_of_documents_is_that_of_their_tokens(tmp_path: Path) -> None:
    record(tmp_path)
    found = attribute(tmp_path, TracIn())
    run, module, ids = Trajectory.load(tmp_path), Words(), shifted_ids()
    parameters = list(module.parameters())
    batch, asked = (
        {n: torch.stack([row[n] for row in given]) for n in ("input_ids", "labels")}
        for given in (rows(), queries())
    )
    # What a mean divides by is held at its average for a row.
    count = (batch["labels"][:, 1:] != -100).sum() / len(batch["labels"])
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for step in (2, 4):
        module.load_state_dict(dict(run.checkpoints[step].parameters))
        losses = module.token_losses(batch)
        own = gradients([(losses * (ids == d)).sum() / count for d in range(6)], parameters)
        theirs = gradients(module.token_losses(asked).sum(1) / (LENGTH - 1), parameters)
        expected += RATE * 2 / len(IDS) * theirs @ own.T
    assert relative(found.values, expected) < 1e-8


def gradients(values: Any, parameters: list[Tensor]) -> Tensor:
    each = [torch.autograd.grad(value, parameters, retain_graph=True) for value in values]
    return torch.stack([torch.cat([g.flatten() for g in own]) for own in each])


Rule = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


def descend(parameter: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
    return parameter - RATE * gradient


def by_adamw(parameter: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
    hyper = {"beta1": BETAS[0], "beta2": BETAS[1], "eps": 1e-8, "weight_decay": DECAY}
    return UPDATES["AdamW"](parameter, gradient, state, ADAMW_RATE, hyper)


@pytest.mark.parametrize(("made", "rule"), [(Words, descend), (ByAdamW, by_adamw)])
def test_unrolled_documents_are_those_of_retraining(
    made: type[Words], rule: Rule, tmp_path: Path
) -> None:
    """Training with a weight on the losses of one document's tokens."""
    record(tmp_path, made())
    with pytest.raises(UnsupportedTrainingError, match="token_weights=True"):
        attribute(tmp_path, Unrolled())
    scores = attribute(tmp_path, Unrolled(token_weights=True))
    assert scores.by_token is not None
    found = sum_by_document(scores.by_token, rows())
    assert found.shape == (3, 6)

    def trained(weights: Tensor) -> Tensor:
        module = Words()
        batches = [rows()[:2], rows()[2:]] * 2
        parameters: dict[str, Any] = dict(module.named_parameters())
        state: dict[str, dict[str, Any]] = {n: {} for n in parameters}
        for part in batches:
            batch = {n: torch.stack([row[n] for row in part]) for n in part[0]}
            ids = F.pad(batch["example_ids"], (0, 1), value=-1)[:, 1:]
            losses = torch.func.functional_call(
                _Losses(module), {f"module.{n}": p for n, p in parameters.items()}, (batch,)
            )
            count = (batch["labels"][:, 1:] != -100).sum()
            own = torch.where(ids >= 0, weights[ids.clamp(min=0)], 0.0)
            loss = (losses * own).sum() / count
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            parameters = {
                n: rule(p, g, state[n])
                for (n, p), g in zip(parameters.items(), gradients, strict=True)
            }
        asked = {n: torch.stack([row[n] for row in queries()]) for n in ("input_ids", "labels")}
        return torch.func.functional_call(
            _Losses(module), {f"module.{n}": p for n, p in parameters.items()}, (asked,)
        ).sum(1) / (LENGTH - 1)

    ones = torch.ones(6, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(trained, ones)
    assert relative(found, -expected) < 1e-8


class _Losses(nn.Module):
    def __init__(self, module: Words) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.module.token_losses(batch)


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="Put labels into the rows"):
        document_removals([{"input_ids": [1], "example_ids": [0]}])
    with pytest.raises(ValueError, match=r"expected both \[position\]"):
        document_removals([{"labels": [1, 2], "example_ids": [0]}])
    with pytest.raises(ValueError, match="Document 1 has no token that counts"):
        document_removals([{"labels": [1, 2, -100], "example_ids": [0, 2, 1]}])
    with pytest.raises(ValueError, match="No row has a token that counts"):
        document_removals([{"labels": [-100], "example_ids": [0]}])


def test_a_collator_that_makes_the_labels_is_refused(tmp_path: Path) -> None:
    record(tmp_path)

    def collate(given: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {n: torch.stack([row[n] for row in given]) for n in given[0]}
        return {**batch, "labels": batch["input_ids"].clone()}

    module = AttributionModule(Words(), str(tmp_path), TracIn())
    with pytest.raises(ValueError, match="collator makes 'labels' itself"):
        module.attribute(
            DataLoader(rows(), 2, collate_fn=collate), loader(queries()), trainer=quiet()
        )
