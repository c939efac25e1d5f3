"""Models of ``transformers`` x adapters of peft x estimators: exactness, time and memory.

    python -m experiments.models.run [MODEL ...] [--adapters none lora] [--examples 64]

Every model is trained as it is: a stock batch of padded texts with ignored labels, its own loss,
``task=None``. A row that is in the results is not run again. ``table.py --write`` puts them into
the README.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from experiments.models.cases import CASES, Case, HuggingFaceModule, loader
from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.runtime.memory import PeakMemory

RESULTS = Path(__file__).parent / "results"
EPOCHS, QUERIES, BATCH = 3, 4, 8
ESTIMATORS: dict[str, Callable[[], Any]] = {
    "TracIn": TracIn,
    "influence (EK-FAC)": InfluenceFunction,
    "SOURCE": Source,
    "unrolled": Unrolled,
}


def with_adapters(model: nn.Module, case: Case, kind: str) -> nn.Module:
    """``none``, ``lora``, ``dora``, ``two`` (two adapters, both active) or ``saved`` (LoRA with a
    module that is trained as a whole)."""
    if kind == "none":
        return model
    import peft

    torch.manual_seed(3)
    saved = {"class": ["classifier"], "picture": ["classifier"]}.get(case.kind, ["lm_head"])
    settings = peft.LoraConfig(
        r=2,
        target_modules=list(case.targets),
        use_dora=kind == "dora",
        modules_to_save=saved if kind == "saved" else None,
    )
    adapted = peft.get_peft_model(model, settings)
    if kind == "two":
        adapted.add_adapter("second", settings)
        adapted.base_model.set_adapter(["default", "second"])
    return adapted


def measure(name: str, kind: str, examples: int) -> dict[str, Any]:
    """One row of the table."""
    case = CASES[name]
    make = lambda: HuggingFaceModule(  # noqa: E731
        with_adapters(case.model(), case, kind), learning_rate=1e-3
    )
    rows, queries, module = case.rows(examples), case.rows(QUERIES, 9), make()
    row: dict[str, Any] = {
        "model": name,
        "adapter": kind,
        "parameters": sum(p.numel() for p in module.parameters()),
        "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        fit(module, folder, rows)
        row["epoch_seconds"] = (time.process_time() - began) / EPOCHS
        sizes = [file.stat().st_size for file in Path(folder).glob("checkpoints/*.h5")]
        row["checkpoint_bytes"] = max(sizes)
        for title, estimator in ESTIMATORS.items():
            attribution = AttributionModule(make(), folder, estimator())
            if "error" not in row:
                with contextlib.redirect_stdout(io.StringIO()):
                    errors = attribution.check(loader(rows, BATCH), loader(queries, QUERIES))
                row["error"] = max(errors.values())
            began = time.process_time()
            with PeakMemory() as memory:
                scores = attribution.attribute(
                    loader(rows, BATCH), loader(queries, QUERIES), self_influence=False
                )
            notes = scores.provenance.get("notes", [])
            row[title] = {
                "seconds": time.process_time() - began,
                "peak_bytes": memory.bytes,
                "one_by_one": any("one by one" in note for note in notes),
                "norm": float(scores.values.norm()),
            }
    return row


def fit(module: HuggingFaceModule, folder: str, rows: Any) -> None:
    recorder = TrajectoryRecorder(folder, num_checkpoints=3)
    Trainer(
        max_epochs=EPOCHS,
        callbacks=[recorder],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader(rows, BATCH, shuffle=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(CASES))
    parser.add_argument("--adapters", nargs="*", default=["none", "lora"])
    parser.add_argument("--examples", type=int, default=64)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.models:
        for kind in arguments.adapters:
            path = RESULTS / f"{name}_{kind}.json"
            if not path.exists():
                row = measure(name, kind, arguments.examples)
                path.write_text(json.dumps(row, indent=1) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
