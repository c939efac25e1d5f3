"""What the study found: a JSON file for each run, with a row for each method, rate and replica.

Test pairs are strings of digits, one for each pair: ``right_hans`` whether the answer is right,
``said_not_hans`` whether it is "not entailed".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda_lightning.store.atomic_write import write_text

RESULTS = Path(__file__).parent / "results"


def path_of(seed: int) -> Path:
    """The file of one run."""
    return RESULTS / f"seed{seed}.json"


def load(seed: int) -> dict[str, Any]:
    """The results of one run so far."""
    path = path_of(seed)
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def save(seed: int, found: dict[str, Any]) -> None:
    """Replace the results of one run."""
    write_text(path_of(seed), json.dumps(found, indent=1) + "\n")


def all_results() -> list[dict[str, Any]]:
    """Those of all runs."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("seed*.json"))]


def digits(text: str) -> Tensor:
    """The numbers that a string of digits stands for, float64."""
    return torch.tensor([int(digit) for digit in text], dtype=torch.float64)
