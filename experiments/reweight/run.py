"""python -m experiments.reweight.run --data-root FOLDER      # goes on where it stopped"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.reweight import orders, words
from tda_lightning.cli.command import quiet_lightning
from tda_lightning.store.atomic_write import write_text

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)


def main() -> None:
    """Both parts, seed by seed."""
    parser = argparse.ArgumentParser(description="Weights of examples, and orders of sources.")
    parser.add_argument("--data-root", default="data", help="folder of the data")
    parser.add_argument("--parts", nargs="+", default=["words", "orders"])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    warnings.filterwarnings("ignore", module="lightning")
    for part in options.parts:
        missing = [seed for seed in options.seeds if not (RESULTS / f"{part}-{seed}.json").exists()]
        if not missing:
            continue
        if part == "words":
            data = words.Data(options.data_root)
            _keep("words-data", data.summary())
            made: Callable[[int], dict[str, Any]] = lambda seed: words.seed_results(data, seed)  # noqa: B023, E731
        else:
            sources = orders.Data(options.data_root)
            made = lambda seed: orders.seed_results(sources, seed)  # noqa: B023, E731
        for seed in missing:
            began = time.process_time()
            found = made(seed)
            _keep(f"{part}-{seed}", {**found, "seconds": round(time.process_time() - began, 1)})
            print(part, seed, round(time.process_time() - began, 1), flush=True)


def _keep(name: str, found: dict[str, Any]) -> None:
    write_text(RESULTS / f"{name}.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
