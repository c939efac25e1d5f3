"""What a part of the study found, as a small JSON file that is kept with the code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda_lightning.evaluation.linear_datamodeling import bootstrap
from tda_lightning.store.atomic_write import write_text

RESULTS = Path(__file__).parent / "results"


def interval(values: Tensor) -> list[float]:
    """Mean, and lower and upper end of its 95% bootstrap interval."""
    found = bootstrap(values.flatten())
    return [round(number, 5) for number in (found.value, found.low, found.high)]


def crossed(values: Tensor, resamples: int = 2000) -> list[float]:
    """The same for [group, pair], where both the groups and the pairs are drawn anew."""
    own, count = torch.Generator().manual_seed(0), values.numel()

    def weights(size: int) -> Tensor:
        drawn = torch.randint(size, (resamples, size), generator=own)
        return torch.zeros(resamples, size, dtype=values.dtype).scatter_add_(
            1, drawn, torch.ones(drawn.shape, dtype=values.dtype)
        )

    means = ((weights(len(values)) @ values) * weights(values.shape[1])).sum(1) / count
    ends = means.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype))
    return [round(number, 5) for number in (float(values.mean()), *ends.tolist())]


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
