"""Small models of ``transformers`` with random weights, as people train them: a stock collator, a
dictionary batch, the model's own loss, an adapter of peft where one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

VOCABULARY, LENGTH, PICTURE = 96, 12, 16
WIDTH, LAYERS, HEADS = 16, 2, 4
IGNORED = -100


class HuggingFaceModule(LightningModule):
    """Any model of ``transformers`` that computes its own loss, trained by AdamW or SGD."""

    def __init__(self, model: nn.Module, optimizer: str = "adamw", learning_rate: float = 1e-2):
        super().__init__()
        self.model = model
        self.optimizer, self.learning_rate = optimizer, learning_rate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(trained, lr=self.learning_rate)
        return torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.01)


class Rows(Dataset[dict[str, Any]]):
    """A list of dictionaries."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def padded(rows: list[dict[str, Any]]) -> transformers.BatchEncoding:
    """What ``DataCollatorForSeq2Seq`` and its like do: texts are padded on the right to the longest
    of the batch, labels with the index that the loss ignores."""
    batch = {}
    for key, first in rows[0].items():
        values = [torch.as_tensor(row[key]) for row in rows]
        if torch.as_tensor(first).dim() == 1:
            fill = {"labels": IGNORED}.get(key, 0)
            batch[key] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        else:
            batch[key] = torch.stack(values)
    return transformers.BatchEncoding(batch)


def texts(size: int, seed: int, kind: str) -> Rows:
    """Random tokens with a rule to be learned, of uneven lengths, in the form that ``kind`` of
    model takes: ``causal``, ``class`` or ``translation``."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(size):
        length = int(torch.randint(LENGTH // 2, LENGTH + 1, (), generator=generator))
        start = torch.randint(3, VOCABULARY, (length,), generator=generator)
        ids = torch.where(torch.arange(length) % 3 == 2, start.roll(1), start)
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kind == "causal":
            row["labels"] = ids.where(torch.arange(length) > 1, torch.tensor(IGNORED))
        elif kind == "translation":
            row["labels"] = ids.flip(0)[: length // 2 + 1]
        else:
            row["labels"] = int(ids[0] > VOCABULARY // 2)
        rows.append(row)
    return Rows(rows)


def pictures(size: int, seed: int, kind: str = "picture") -> Rows:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, 3, PICTURE, PICTURE, generator=generator)
    labels = (values.mean((1, 2, 3)) > 0).long().tolist()
    return Rows([{"pixel_values": v, "labels": n} for v, n in zip(values, labels, strict=True)])


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, intermediate_size=2 * WIDTH, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
            max_position_embeddings=LENGTH, tie_word_embeddings=True, use_cache=False, **options,
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=4, d_ff=2 * WIDTH, num_layers=LAYERS,
            num_heads=HEADS, relative_attention_num_buckets=8, decoder_start_token_id=0,
            use_cache=False,
        )
    )  # fmt: skip


def _mixtral(**options: Any) -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
            num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=LENGTH,
            use_cache=False, **options,
        )
    )  # fmt: skip


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=PICTURE, patch_size=4, hidden_size=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, intermediate_size=2 * WIDTH, num_labels=2,
        )
    )  # fmt: skip


def _convnext() -> nn.Module:
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(
            image_size=PICTURE, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1],
            num_labels=2, layer_scale_init_value=0.5,
        )
    )  # fmt: skip


def _resnet() -> nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
            num_labels=2,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and the form of its data."""

    factory: Callable[[], nn.Module]
    data: Callable[[int, int, str], Rows]
    kind: str
    targets: tuple[str, ...] = ()  # of adapters

    def model(self, seed: int = 0) -> nn.Module:
        """Random weights, dropout off: stated sizes, no download."""
        torch.manual_seed(seed)
        model = self.factory()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        return model

    def rows(self, size: int, seed: int = 0) -> Rows:
        return self.data(size, seed, self.kind)


CASES = {
    "bert": Case(_bert, texts, "class", ("query", "value")),
    "gpt2": Case(_gpt2, texts, "causal", ("c_attn",)),
    "llama": Case(_llama, texts, "causal", ("q_proj", "v_proj")),
    "llama_eager": Case(lambda: _llama(attn_implementation="eager"), texts, "causal", ("q_proj",)),
    "t5": Case(_t5, texts, "translation", ("q", "v")),
    "mixtral": Case(_mixtral, texts, "causal", ("q_proj", "v_proj")),
    "vit": Case(_vit, pictures, "picture", ("q_proj", "v_proj")),
    "convnext": Case(_convnext, pictures, "picture", ("pwconv1", "pwconv2")),
    "resnet": Case(_resnet, pictures, "picture", ("convolution",)),
}


def loader(rows: Rows, batch_size: int = 8, shuffle: bool = False) -> DataLoader[Any]:
    """Batches by the stock way of padding."""
    return DataLoader(rows, batch_size, shuffle=shuffle, collate_fn=padded)
