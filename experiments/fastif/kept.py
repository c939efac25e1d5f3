"""What a part of the study found, as a small JSON file that is kept with the code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tda_lightning.evaluation.lds import bootstrap
from tda_lightning.store.durable import write_text

RESULTS = Path(__file__).parent / "results"


def interval(values: Tensor) -> list[float]:
    """Mean, and lower and upper end of its 95% bootstrap interval."""
    found = bootstrap(values.flatten())
    return [round(number, 5) for number in (found.value, found.low, found.high)]


def once(part: str, seed: int, make: Callable[[], dict[str, Any]]) -> None:
    """Make a part's result, unless it is there."""
    path = RESULTS / f"{part}-{seed}.json"
    if path.exists():
        return
    print(f"{part}, seed {seed}", flush=True)
    found = make()
    RESULTS.mkdir(exist_ok=True)
    write_text(path, json.dumps(found, indent=1) + "\n")


def load(part: str) -> dict[int, dict[str, Any]]:
    """A part's results by seed."""
    files = sorted(RESULTS.glob(f"{part}-*.json"))
    return {int(file.stem.rpartition("-")[2]): json.loads(file.read_text()) for file in files}
