"""Queries with their strongest proponents, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from tda_lightning import Scores
from tda_lightning.examples.data.outliers import as_pixels
from tda_lightning.report.pictures import _png

ZOOM, MARGIN, GAP = 4, 2, 12  # pixels


def contact_sheet(
    train: Dataset, queries: Dataset, shown: Sequence[int], rows: Mapping[str, Scores], top: int
) -> bytes:
    """A PNG: a line for each query, the query first, then proponents by each estimator in turn."""
    lines = []
    for query in shown:
        tiles = [_tile(queries[query][0])]
        gap = np.full((len(tiles[0]), GAP, 3), 255, np.uint8)
        for scores in rows.values():
            chosen = scores.proponents(query, top)[0].tolist()
            tiles += [gap, *(_tile(train[n][0]) for n in chosen)]
        lines.append(np.concatenate(tiles, axis=1))
    return _png(np.concatenate(lines, axis=0))


def _tile(image: torch.Tensor) -> np.ndarray:
    """An image with a white margin."""
    pixels = as_pixels(image).numpy().repeat(ZOOM, 0).repeat(ZOOM, 1)
    margin = ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))
    return np.pad(pixels, margin, constant_values=255)
