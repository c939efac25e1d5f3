"""The Lightning Trainers that commands use."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from omegaconf import DictConfig

# Nothing written, nothing shown.
SILENT: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def configured_trainer(
    node: DictConfig, callbacks: Sequence[Callback] = (), progress: bool = False
) -> Trainer:
    """The Trainer of a configuration; with ``progress``, it has a bar where a person watches."""
    show = progress and node.get("enable_progress_bar", True) and sys.stderr.isatty()
    given = instantiate(node.get("callbacks"), _convert_="all") or []
    bar = [RichProgressBar()] if show else []
    make = instantiate(node, _partial_=True, _convert_="all")
    return make(callbacks=[*given, *callbacks, *bar], enable_progress_bar=bool(show))


def silent_trainer() -> Trainer:
    """A Trainer for an attribution in the background, on one device."""
    return Trainer(accelerator="auto", devices=1, inference_mode=False, **SILENT)
