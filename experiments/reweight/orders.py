"""(b) Three sources of pairs, one after another: does SOURCE by segment rank the six orders?

One run is recorded on all pairs, shuffled. Its scores by segment say what the uses of each source
in each third of training did to the target. An order puts all uses of a source into one third, so
its predicted effect is the sum of the three entries, each three times. Every order is then trained.
"""

from __future__ import annotations

import csv
import gzip
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from experiments.reweight.training import encoder, losses_of, trained
from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import Source
from tda_lightning.examples.data import MNLIData
from tda_lightning.examples.data.pairs import sequence, words
from tda_lightning.examples.data.text import encode
from tda_lightning.tasks import ClassificationTask

RUNS = Path("runs/reweight")
SOURCES = ("MNLI", "HANS-like", "RTE")
EACH, TARGET_EACH = 1200, 100
ORDERS = tuple(itertools.permutations(range(len(SOURCES))))


class Data:
    """Training pairs of each source, one source after another, and the target of all three."""

    def __init__(self, root: str) -> None:
        mnli = MNLIData(root=root, num_train=EACH, num_query=TARGET_EACH)
        hans = MNLIData(root=root, num_train=EACH, num_query=None, queries="hans")
        inputs, answers = hans.query_dataset.tensors
        own = torch.Generator().manual_seed(0)
        places = torch.randperm(len(answers), generator=own)
        drawn, other = places[:EACH], places[EACH : EACH + TARGET_EACH]
        hans.dataset("query")
        rte = [read_rte(Path(root) / "rte" / f"{name}.tsv.gz", mnli) for name in ("train", "dev")]
        self.train: list[tuple[Tensor, Tensor]] = [
            mnli.train_dataset.tensors,
            (inputs[drawn], answers[drawn]),
            tuple(part[:EACH] for part in rte[0]),
        ]
        targets = [
            mnli.query_dataset.tensors,
            (inputs[other], answers[other]),
            tuple(part[:TARGET_EACH] for part in rte[1]),
        ]
        self.target = TensorDataset(*(torch.cat(part) for part in zip(*targets, strict=True)))

    def in_order(self, order: tuple[int, ...]) -> TensorDataset:
        """The sources one after another."""
        chosen = [self.train[source] for source in order]
        return TensorDataset(*(torch.cat(part) for part in zip(*chosen, strict=True)))


def read_rte(path: Path, data: MNLIData) -> tuple[Tensor, Tensor]:
    """Pairs of RTE in the words that MNLI has numbers for."""
    data.setup()
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    length = data.sequence_length
    texts = [sequence(words(row["sentence1"]), words(row["sentence2"]), length) for row in rows]
    numbers = encode([word for text in texts for word in text], data.vocabulary)
    labels = torch.tensor([int(row["label"] != "entailment") for row in rows])
    # Not in the file's order.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return numbers.view(len(rows), length)[order], labels[order]


def shuffled_within(data: Data, order: tuple[int, ...], seed: int) -> TensorDataset:
    """The pairs of an order, each source shuffled by the seed."""
    own = torch.Generator().manual_seed(seed)
    inputs, answers = data.in_order(order).tensors
    places = torch.cat(
        [at * EACH + torch.randperm(EACH, generator=own) for at in range(len(SOURCES))]
    )
    return TensorDataset(inputs[places], answers[places])


def seed_results(data: Data, seed: int) -> dict[str, Any]:
    """Scores by source and segment of one recorded run, and the target's loss after each order."""
    folder = RUNS / f"orders{seed}"
    recorder = TrajectoryRecorder(folder, num_checkpoints=6, curvature="online", overwrite=True)
    mixed = data.in_order((0, 1, 2))
    model = trained(mixed, seed, [recorder], epochs=1, schedule="constant")
    attribution = AttributionModule(
        encoder("constant"),
        trajectory=str(folder),
        estimator=Source(num_segments=len(SOURCES)),
        task=ClassificationTask(),
    )
    scores = attribution.attribute(
        mixed, data.target, trainer=silent_trainer(), self_influence=False
    )
    assert scores.by_segment is not None
    by_source = scores.by_segment.double().mean(1).unflatten(1, (len(SOURCES), EACH)).sum(2)
    losses = []
    for order in ORDERS:
        pairs = shuffled_within(data, order, seed)
        after = trained(pairs, seed, epochs=1, schedule="constant", in_order=True)
        losses.append(float(losses_of(after, data.target).mean()))
    return {
        "by_segment": by_source.tolist(),  # [segment, source]
        "predicted": predicted_of(by_source),
        "losses": losses,
        "mixed": float(losses_of(model, data.target).mean()),
    }


def predicted_of(by_source: Tensor) -> list[float]:
    """Minus what the uses in an order did, for each order: small where the loss is."""
    return [
        -3 * float(sum(by_source[segment, source] for segment, source in enumerate(order)))
        for order in ORDERS
    ]
