"""Tail-patch on a small language model: does a step on a proponent make the target likelier?

python -m experiments.judges.tail_patch --data-root FOLDER

quanda's metric (Chang et al., 2025, https://arxiv.org/abs/2410.17413) takes one step of AdamW on
each of a query's first proponents and reports the change of the target's probability. It needs a
causal model of transformers with a tokenizer from the hub: here a GPT-2 of two layers, trained from
scratch on 400 sequences of WikiText-2, with a tokenizer of the words in a folder. The target is the
last word of a held-out sequence.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.judges.quanda_modules import enter_quanda
from experiments.judges.run import RESULTS, Notes
from tda_lightning import AttributionModule, Scores, TrajectoryRecorder
from tda_lightning.cli.command import quiet_lightning
from tda_lightning.cli.trainers import SILENT, silent_trainer
from tda_lightning.estimators import TRAK, InfluenceFunction, Source, TracIn
from tda_lightning.evaluation import bm25, random_scores
from tda_lightning.examples.data import WikiText2Data

NUM_TRAIN, NUM_QUERY, LENGTH, VOCABULARY = 400, 48, 32, 2048
EPOCHS, BATCH_SIZE, RATE, TOP = 6, 16, 1e-3, 5
# What scores, and the share of the data that the question is about.
OURS: dict[str, tuple[Callable[[], Any], float]] = {
    "TracIn": (TracIn, 1.0),
    "TRAK": (TRAK, 1.0),
    "EK-FAC": (InfluenceFunction, 1.0),
    "SOURCE": (Source, 1.0),
    "SOURCE at .5": (Source, 0.5),
}


class Sequences(Dataset[dict[str, Tensor]]):
    """What a model of transformers takes; for queries the last word alone has a loss."""

    def __init__(self, tokens: Tensor, last: bool) -> None:
        self.tokens, self.last = tokens, last

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        labels = tokens.clone()
        if self.last:
            labels[:-1] = -100
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


class Causal(LightningModule):
    """A small GPT-2 without dropout."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_positions": LENGTH + 1, "n_embd": 64, "n_layer": 2, "n_head": 4}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **dropout))

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=RATE)


def tokenizer(words: list[str], folder: Path) -> str:
    """A folder that ``AutoTokenizer`` opens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    numbers = {word: place for place, word in enumerate(words)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(numbers, unk_token="<unk>")),
        eos_token="<eos>",
        unk_token="<unk>",
    )
    made.save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Train, attribute, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True, help="folder of the data sets")
    parser.add_argument("--folder", type=Path, default=Path("runs/judges/tail_patch"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    warnings.filterwarnings("ignore")
    enter_quanda()
    data = WikiText2Data(
        options.data_root,
        sequence_length=LENGTH,
        vocabulary_size=VOCABULARY,
        num_train=NUM_TRAIN,
        num_query=NUM_QUERY,
    )
    data.setup()
    parts = (data.train_dataset.tensors, data.query_dataset.tensors)
    tokens = [torch.cat([inputs, targets[:, -1:]], dim=1) for inputs, targets in parts]
    train, query = Sequences(tokens[0], last=False), Sequences(tokens[1], last=True)
    seed_everything(0, verbose=False)
    module = Causal()
    recorder = TrajectoryRecorder(str(options.folder / "run"), num_checkpoints=6, overwrite=True)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, generator=order)
    Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[recorder], **SILENT).fit(
        module, loader
    )
    rows: dict[str, Scores] = {
        "BM25": bm25(data.documents("train"), data.documents("query")),
        "Random": random_scores(NUM_QUERY, NUM_TRAIN, 0),
    }
    notes = Notes(RESULTS / "tail_patch.json")
    for name, (make, keep) in OURS.items():
        if name not in notes.found:
            attribution = AttributionModule(module, str(options.folder / "run"), make())
            rows[name] = attribution.attribute(
                train, query, trainer=silent_trainer(), self_influence=False, keep=keep
            )
    folder = tokenizer(data.vocabulary, options.folder / "tokenizer")
    notes.once("target", lambda: chance(module, query))
    for name, scores in rows.items():
        notes.once(name, lambda s=scores: judged(s.values, module, train, query, folder))


def whole(query: Sequences) -> dict[str, Tensor]:
    """All queries as one batch."""
    rows = [query[index] for index in range(len(query))]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def chance(module: Causal, query: Sequences) -> float:
    """The mean probability of the targets before any step."""
    batch = whole(query)
    labels = batch.pop("labels")
    with torch.no_grad():
        chances = module.eval().model(**batch).logits[:, -2].softmax(-1)
    return float(chances.gather(1, labels[:, -1:]).mean())


def judged(
    values: Tensor, module: Causal, train: Sequences, query: Sequences, tokenizer_folder: str
) -> list[float]:
    """quanda's mean change of the target's probability with its bootstrap interval."""
    from quanda.metrics.downstream_eval import TailPatchMetric

    batch = whole(query)
    labels = batch.pop("labels")
    metric = TailPatchMetric(
        model=module.model, train_dataset=train, k=TOP, tokenizer_name=tokenizer_folder
    )
    metric.update(values.float(), batch, labels)
    found = metric.compute_bootstrapped(seed=0)
    return [found["score"], found["ci_low"], found["ci_high"]]


if __name__ == "__main__":
    main()
