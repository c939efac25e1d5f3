"""Weights as a file: CSV, one line ``index,weight`` for each training example, in order."""

from __future__ import annotations

import csv
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from tda_lightning.reweighting.projection import check_weights
from tda_lightning.store.atomic_write import write_text

_HEADER = ["index", "weight"]


def save_weights(weights: Tensor, path: str | PathLike[str]) -> None:
    """Write weights, in full precision; an older file is replaced."""
    own = check_weights(weights, len(weights)).tolist()
    lines = [",".join(_HEADER), *(f"{index},{weight!r}" for index, weight in enumerate(own))]
    write_text(Path(path), "\n".join(lines) + "\n")


def load_weights(path: str | PathLike[str]) -> Tensor:
    """The weights of a file, float64 [train].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another form, or weights that cannot be trained with.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Make one with tda reweight.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    try:
        if rows[0] != _HEADER or [int(row[0]) for row in rows[1:]] != list(range(len(rows) - 1)):
            raise ValueError("other lines")
        values = [float(row[1]) for row in rows[1:]]
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"{path}: expected the header index,weight and a line for each training example, in "
            f"order from 0, as tda reweight writes it; got {error}."
        ) from None
    return check_weights(torch.tensor(values, dtype=torch.float64), len(values))
