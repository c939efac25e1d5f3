"""FAISS's sub-linear search of an index against the search of all its rows.

python -m experiments.index.faiss_recall FOLDER    # a run of experiments/fidelity

Builds an index of leading coordinates for an influence function in FOLDER/index/faiss, asks the
run's queries, and writes results/faiss.json: the share of the ten strongest that is found, and
processor seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from tda_lightning import AttributionModule, Trajectory
from tda_lightning.cli.recorded_run import load_parts, sources
from tda_lightning.cli.run_config import load_config
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.index import ApproximateSearch, AttributionIndex

RESULTS = Path(__file__).parent / "results" / "faiss.json"
K = 10


def main() -> None:
    """All rows."""
    import faiss

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    run = Path(sys.argv[1])
    config = OmegaConf.create(
        {"trust_config": False, "data": {"root": None, "num_query": None}, "config": None}
    )
    data, module, task = load_parts(config, load_config(run))
    train, query = sources(data, 256)
    attribution = AttributionModule(module, Trajectory.load(str(run)), InfluenceFunction(), task)
    index = AttributionIndex.build(
        attribution, train, run / "index" / "faiss", compression="leading", dtype="int8"
    )
    asked = index.encode(query)
    exact, seconds = _timed(lambda: index.search_encoded(asked, K), len(asked))
    close, filled = _timed(lambda: ApproximateSearch(index), 1)
    found: dict[str, Any] = {
        "examples": index.num_examples,
        "bytes": index.bytes_per_example,
        "queries": len(asked),
        "cells": close.cells,
        "fill_seconds": round(filled, 2),
        "exact_seconds": seconds,
        "rows": [],
    }
    for probes in (1, 4, 16, 64, close.cells):
        result, seconds = _timed(lambda p=probes: close.search_encoded(asked, K, p), len(asked))
        recall = [
            float((one[:, :, None] == other[:, None]).any(2).float().mean())
            for one, other in (
                (exact.indices, result.indices),
                (exact.opponents, result.opponents),
            )
        ]
        found["rows"].append({"probes": probes, "recall": recall, "seconds": seconds})
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(found)


def _timed(work: Callable[[], Any], count: int) -> tuple[Any, float]:
    """The result, and processor seconds for each of ``count``: the least of three."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        result = work()
        seconds.append((time.process_time() - began) / count)
    return result, min(seconds)


if __name__ == "__main__":
    main()
