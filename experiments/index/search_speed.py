"""Seconds of a search of one query, by the clock and of the processor.

python -m experiments.index.search_speed RUN FOLDER --threads 2

RUN is a run of experiments/fidelity; the indices of factor pairs at 1 KiB are made in FOLDER, if
they are not there. Their rows are repeated until there are as many as are to be searched: they are
in the system's memory, not on the disk. Meant for a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

from tda_lightning import AttributionModule, Trajectory
from tda_lightning.cli.recorded_run import load_parts, sources
from tda_lightning.cli.run_config import load_config
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.index import AttributionIndex
from tda_lightning.index.search import search

_QUERIES = 8
_NOTHING_CHANGED = OmegaConf.create(
    {"trust_config": False, "data": {"root": None, "num_query": None}, "config": None}
)


def main() -> None:
    """Build what is missing, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[60_000, 1_000_000])
    parser.add_argument("--dtypes", nargs="*", default=["int8", "int4"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recorded = load_config(options.run)
    data, module, task = load_parts(_NOTHING_CHANGED, recorded)
    train, query = sources(data, 256)
    attribution = AttributionModule(
        module, Trajectory.load(str(options.run)), InfluenceFunction(), task
    )
    for dtype in options.dtypes:
        index = AttributionIndex.build(
            attribution, train, options.folder / dtype, dtype=dtype, compression="factors"
        )
        asked = index.encode(query)
        for rows in options.rows:
            _measure(index, asked, rows, options.threads)


def _measure(index: AttributionIndex, asked: torch.Tensor, rows: int, threads: int) -> None:
    shards = list(index.shards()) * max(1, rows // index.num_examples)
    count = sum(len(own.codes) for own in shards)
    clock, processor = [], []
    for query in range(0, len(asked), len(asked) // _QUERIES):
        began, worked = time.perf_counter(), time.process_time()
        search(index.compression, asked[query : query + 1], shards, index.facts.dtype, 10, 1.0)
        clock.append(time.perf_counter() - began)
        processor.append(time.process_time() - worked)
    told = [f"{statistics.median(own):.3f} s (least {min(own):.3f})" for own in (clock, processor)]
    print(
        f"{index.facts.dtype}, {count:,} rows, {threads} threads: {told[0]} by the clock, "
        f"{told[1]} of the processor, medians of {len(clock)} queries",
        flush=True,
    )


if __name__ == "__main__":
    main()
