r"""FAISS's sub-linear search of an index against the search of all its rows.

python -m experiments.index.faiss_recall RUN                  # a run of experiments/fidelity
python -m experiments.index.faiss_recall RUN --name faiss_repeated --cells 512 --copies 4 \
    --probes 1 4 16 64

Builds an index of leading coordinates for an influence function in RUN/index/faiss, asks the run's
queries, and writes results/NAME.json: the share of the ten strongest that is found, and processor
seconds. With --copies every row is there so many times, the later ones with noise: a larger store
than there is data for.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from tda_lightning import AttributionModule, Trajectory
from tda_lightning.cli.recorded_run import load_parts, sources
from tda_lightning.cli.run_config import load_config
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.index import ApproximateSearch, AttributionIndex
from tda_lightning.index.facts import Appended
from tda_lightning.index.rounding import numbers_of, rounded
from tda_lightning.store.index_files import write_shard
from tda_lightning.store.layout import COMPRESSION_FILE

RESULTS = Path(__file__).parent / "results"
K = 10
NOISE = 0.5  # of a row's length, in a random direction


def main() -> None:
    """All rows."""
    import faiss

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default="faiss")
    parser.add_argument("--cells", type=int)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--probes", type=int, nargs="*", default=[1, 4, 16, 64, 256])
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    run = options.run
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
    if options.copies > 1:
        index = _repeated(index, options.copies, run / "index" / options.name)
    exact, seconds = _timed(lambda: index.search_encoded(asked, K), len(asked))
    some = asked[:10].split(1)
    _, alone = _timed(lambda: [index.search_encoded(own, K) for own in some], len(some))
    began = time.process_time()
    close = ApproximateSearch(index, options.cells)
    found: dict[str, Any] = {
        "examples": index.num_examples,
        "bytes": index.bytes_per_example,
        "queries": len(asked),
        "cells": close.cells,
        "fill_seconds": round(time.process_time() - began, 2),
        "exact_seconds": seconds,
        "exact_alone_seconds": alone,
        "rows": [],
    }
    for probes in options.probes:
        result, seconds = _timed(lambda p=probes: close.search_encoded(asked, K, p), len(asked))
        recall = [
            float((one[:, :, None] == other[:, None]).any(2).float().mean())
            for one, other in (
                (exact.indices, result.indices),
                (exact.opponents, result.opponents),
            )
        ]
        found["rows"].append({"probes": probes, "recall": recall, "seconds": seconds})
    text = json.dumps(found, indent=1) + "\n"
    (RESULTS / f"{options.name}.json").write_text(text, encoding="utf-8")
    print(found)


def _repeated(index: AttributionIndex, copies: int, path: Path) -> AttributionIndex:
    """An index whose rows are those of another, again and again, with noise from the second time
    on."""
    facts, generator = index.facts, torch.Generator().manual_seed(0)
    for copy in range(copies):
        for shard in index.shards():
            rows = numbers_of(shard.codes, facts.dtype, facts.width)
            rows *= torch.from_numpy(shard.scales)[:, None]
            if copy:
                noise = torch.randn(rows.shape, generator=generator)
                rows += noise * (NOISE * rows.norm(dim=1) / facts.width**0.5)[:, None]
            first = copy * facts.num_train + shard.first
            write_shard(path, first, *rounded(rows, facts.dtype), facts.compression)
    shutil.copyfile(index.path / COMPRESSION_FILE, path / COMPRESSION_FILE)
    # Shards end where a copy does, as those of data sets that were appended one after the other.
    count = facts.num_train
    appended = tuple(Appended(count * n, count, None, finished=True) for n in range(1, copies))
    replace(facts, appended=appended).write(path)
    return AttributionIndex.open(path)


def _timed(work: Callable[[], Any], count: int) -> tuple[Any, float]:
    """The result, and processor seconds for each of ``count``: the least of two."""
    seconds = []
    for _ in range(2):
        began = time.process_time()
        result = work()
        seconds.append((time.process_time() - began) / count)
    return result, min(seconds)


if __name__ == "__main__":
    main()
