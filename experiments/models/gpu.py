"""GPT-2 of 124 million weights on a GPU, whole and with LoRA: times and memory of scoring.

    python -m experiments.models.gpu OUTPUT.json          # 1000 texts, 100 queries of 256 tokens
    python -m experiments.models.gpu OUTPUT.json --toy    # tiny sizes, on whatever there is

Random weights: times do not depend on them. One epoch of AdamW is recorded in float32, which the
scores are compared with; a job that does not fit into memory is noted as such, and the next begins.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, default_collate

from experiments.models.cases import HuggingFaceModule, Rows
from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.estimators import Estimator, InfluenceFunction, Source, TracIn

WHOLE = {"width": 768, "depth": 12, "heads": 12, "vocabulary": 50257, "length": 256}
TOY = {"width": 32, "depth": 2, "heads": 2, "vocabulary": 96, "length": 16}
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "TracIn": TracIn,
    "influence (EK-FAC)": InfluenceFunction,
    "SOURCE (blocks)": lambda: Source(num_segments=1, leading_directions=0),
}


def gpt2(sizes: dict[str, int], lora: bool) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=sizes["vocabulary"], n_positions=sizes["length"], n_embd=sizes["width"],
            n_layer=sizes["depth"], n_head=sizes["heads"], bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip
    if lora:
        import peft

        targets = ["c_attn", "c_fc", "c_proj"]
        settings = peft.LoraConfig(r=8, target_modules=targets, fan_in_fan_out=True)
        model = peft.get_peft_model(model, settings)
    return model


def texts(count: int, sizes: dict[str, int], seed: int) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(sizes["vocabulary"], (count, sizes["length"]), generator=draw)
    rows = Rows([{"input_ids": row, "labels": row} for row in tokens])
    return DataLoader(rows, 8, collate_fn=default_collate)


def trainer(epochs: int, *callbacks: TrajectoryRecorder) -> Trainer:
    return Trainer(
        max_epochs=epochs, callbacks=list(callbacks), devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds by the clock, and the peak of the GPU's memory in GiB."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    found = {"seconds": time.perf_counter() - began}
    if on_gpu:
        found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    sizes, num_train, num_query = (TOY, 16, 4) if options.toy else (WHOLE, 1000, 100)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found: dict[str, Any] = {"device": device, "sizes": sizes, "texts": [num_train, num_query]}
    train, query = texts(num_train, sizes, 1), texts(num_query, sizes, 2)
    for kind in ("lora", "full"):
        with tempfile.TemporaryDirectory() as folder:
            module = HuggingFaceModule(gpt2(sizes, kind == "lora"), learning_rate=1e-4)
            recorder = TrajectoryRecorder(folder, num_checkpoints=1)
            fit = trainer(1, recorder)
            found[kind] = {"epoch": measured(partial(fit.fit, module, train))}
            for title, estimator in ESTIMATORS.items():
                attribution = AttributionModule(module, folder, estimator())
                scored = partial(
                    attribution.attribute, train, query, trainer=trainer(1), self_influence=False
                )
                try:
                    found[kind][title] = measured(scored)
                except torch.cuda.OutOfMemoryError as error:
                    found[kind][title] = {"out of memory": str(error)[:200]}
                options.output.write_text(json.dumps(found, indent=1) + "\n")
                print(kind, title, found[kind][title], flush=True)


if __name__ == "__main__":
    main()
