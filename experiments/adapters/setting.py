"""Two small transformers that are pre-trained here, and what they are fine-tuned on.

``gpt``: GPT-2 of ``transformers`` (width 32, two layers, 512 words), pre-trained on the validation
text of WikiText-2, fine-tuned on sentences of news (RTE's premises). ``encoder``: BERT of the same
width, pre-trained to tell entailment in pairs of MultiNLI, fine-tuned to tell it in pairs of RTE.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, default_collate

from experiments.models.cases import HuggingFaceModule, Rows
from tda_lightning import TrajectoryRecorder
from tda_lightning.examples.data.pairs import words
from tda_lightning.examples.data.text import build_vocabulary, encode, read_words, sequences
from tda_lightning.records.fresh_training import FreshTraining

MARKS = ("<pad>", "<unk>", "<eos>", "<sep>")
VOCABULARY, WIDTH, DEPTH, HEADS, RANK = 512, 32, 2, 4, 4
LENGTHS = {"gpt": 24, "encoder": 32}
TRAIN, QUERIES, BATCH, EPOCHS = 128, 20, 16, 5
PRETRAINED_ON, PRETRAINING_EPOCHS = {"gpt": 5000, "encoder": 3000}, 3
RATES = {"lora": 5e-3, "full": 1e-3}
TARGETS = {"gpt": ["c_attn", "c_fc", "c_proj"], "encoder": ["query", "value", "dense"]}
MODELS, KINDS = ("gpt", "encoder"), ("lora", "full")


@dataclass(frozen=True)
class Data:
    """Examples of each part."""

    pretraining: Rows
    train: Rows
    queries: Rows


def load(model: str, root: Path) -> Data:
    """The same examples in every run."""
    draw = torch.Generator().manual_seed(0)
    rte = pairs(root / "rte" / "train.tsv.gz", "sentence1", "sentence2", "label")
    if model == "gpt":
        wiki = read_words(root / "wikitext2" / "wiki.valid.tokens.gz")
        news = [word for first, _, _ in rte for word in (*words(first), "<eos>")]
        known = build_vocabulary(wiki + news, MARKS, VOCABULARY, 2)
        parts = [_texts(encode(text, known)) for text in (wiki, news)]
    else:
        mnli = pairs(root / "mnli" / "dev_matched.tsv.gz", "premise", "hypothesis", "gold_label")
        text = [w for part in (mnli, rte) for a, b, _ in part for w in words(a) + words(b)]
        known = build_vocabulary(text, MARKS, VOCABULARY, 2)
        parts = [_pairs(part, known) for part in (mnli, rte)]
    first, second = (
        [rows[n] for n in torch.randperm(len(rows), generator=draw).tolist()] for rows in parts
    )
    return Data(
        Rows(first[: PRETRAINED_ON[model]]),
        Rows(second[:TRAIN]),
        Rows(second[TRAIN : TRAIN + QUERIES]),
    )


def pairs(path: Path, first: str, second: str, label: str) -> list[tuple[str, str, int]]:
    """Sentences and whether the first entails the second."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row[first], row[second], int(row[label] == "entailment")) for row in rows]


def _texts(tokens: torch.Tensor) -> list[dict[str, Any]]:
    cut = sequences(tokens, LENGTHS["gpt"] - 1)
    return [{"input_ids": row, "labels": row} for row in cut]


def _pairs(rows: Sequence[tuple[str, str, int]], known: Sequence[str]) -> list[dict[str, Any]]:
    """Premises are cut so that the hypothesis fits."""
    found, length = [], LENGTHS["encoder"]
    for first, second, label in rows:
        own = words(second)[: length // 2]
        text = [*own, "<sep>", *words(first)[: length - 1 - len(own)]]
        ids = encode(text, known)
        padded = nn.functional.pad(ids, (0, length - len(ids)))
        mask = (torch.arange(length) < len(ids)).long()
        found.append({"input_ids": padded, "attention_mask": mask, "labels": torch.tensor(label)})
    return found


def network(model: str) -> nn.Module:
    """Random weights; no dropout; attention that can be differentiated twice."""
    seed_everything(0, verbose=False)
    if model == "gpt":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY, n_positions=LENGTHS[model], n_embd=WIDTH, n_layer=DEPTH,
                n_head=HEADS, bos_token_id=2, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0, attn_implementation="eager",
            )
        )  # fmt: skip
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=LENGTHS[model], hidden_size=WIDTH,
            num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
            attn_implementation="eager",
        )
    )  # fmt: skip


def trainer(epochs: int, *callbacks: TrajectoryRecorder) -> Trainer:
    return Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def pretrained(model: str, data: Data, folder: Path) -> nn.Module:
    """The base, trained where it is not there yet."""
    base, file = network(model), folder / f"{model}.pt"
    if not file.exists():
        module = HuggingFaceModule(base, learning_rate=2e-3)
        seed_everything(0, verbose=False)
        loader = DataLoader(data.pretraining, 32, shuffle=True, collate_fn=default_collate)
        trainer(PRETRAINING_EPOCHS).fit(module, loader)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(base.state_dict(), file)
    base.load_state_dict(torch.load(file, weights_only=True))
    return base


def module(model: str, kind: str, base: nn.Module, seed: int = 0) -> HuggingFaceModule:
    """What is fine-tuned: the base as a whole, or adapters of a seed on it, with the encoder's
    classifier."""
    if kind == "lora":
        import peft

        seed_everything(100 + seed, verbose=False)
        settings = peft.LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=TARGETS[model],
            modules_to_save=["classifier"] if model == "encoder" else None,
            fan_in_fan_out=model == "gpt",
        )
        base = peft.get_peft_model(base, settings)
    return HuggingFaceModule(base, learning_rate=RATES[kind])


def training(module: HuggingFaceModule, train: Rows, seed: int) -> FreshTraining:
    """Fine-tuning with batches of an order of its own."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(train, BATCH, True, collate_fn=default_collate, generator=order)
    return FreshTraining(trainer(EPOCHS), module, loader)


class Batches(LightningDataModule):
    """A loader of training batches."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader


def fine_tune(module: HuggingFaceModule, train: Rows, seed: int, folder: Path) -> None:
    """Recorded."""
    made = training(module, train, seed)
    recorder = TrajectoryRecorder(folder, num_checkpoints=6, overwrite=True)
    made.trainer.callbacks.append(recorder)
    made.trainer.fit(module, made.data)
