"""The encoder of this study trained on given pairs, and what it then says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning.cli.trainers import SILENT
from tda_lightning.examples.models import Classifier, Encoder
from tda_lightning.examples.models.schedules import constant, cosine

BATCH, RATE, DECAY = 32, 1e-3, 0.01


def encoder(schedule: str = "cosine") -> Classifier:
    """``experiment=mnli_encoder``, untrained."""
    shapes = {
        "cosine": partial(cosine, warmup=0.05),
        "constant": constant,
    }
    network = Encoder(vocabulary_size=2048, context=48, outputs=2, width=32, depth=2, heads=4)
    optimizer = partial(torch.optim.AdamW, lr=RATE, weight_decay=DECAY)
    return Classifier(network, optimizer, shapes[schedule])


def trained(
    pairs: TensorDataset,
    seed: int,
    callbacks: Sequence[Callback] = (),
    epochs: int = 2,
    schedule: str = "cosine",
    in_order: bool = False,
) -> Classifier:
    """The encoder trained from a seed, on shuffled pairs or in their order."""
    seed_everything(seed, workers=True, verbose=False)
    module = encoder(schedule)
    order = torch.Generator().manual_seed(seed)
    loader: DataLoader[Any] = DataLoader(
        pairs, batch_size=BATCH, shuffle=not in_order, generator=order
    )
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, **SILENT}
    Trainer(max_epochs=epochs, callbacks=[*callbacks], **settings).fit(module, loader)
    return module.eval()


def outputs_of(module: nn.Module, inputs: Tensor) -> Tensor:
    """Logits [pair, class]."""
    module.eval()
    with torch.no_grad():
        return torch.cat([module(part) for part in inputs.split(500)])


def losses_of(module: nn.Module, pairs: TensorDataset) -> Tensor:
    """Loss of each pair, [pair]."""
    inputs, targets = pairs.tensors
    return F.cross_entropy(outputs_of(module, inputs), targets, reduction="none")
