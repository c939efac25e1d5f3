"""Scores as tables for Weights & Biases."""

from __future__ import annotations

from typing import Any

import numpy as np

from tda_lightning.exports.long_rows import long_rows
from tda_lightning.exports.packages import needed
from tda_lightning.exports.training_examples import training_table
from tda_lightning.records.rendered import Rendered, Renderer
from tda_lightning.records.scores import Scores


def wandb_tables(scores: Scores, k: int = 8, render: Renderer | None = None) -> dict[str, Any]:
    """Tables to log with ``run.log(wandb_tables(scores))``.

    ``tda/pairs`` has the ``k`` most helpful and the ``k`` most harmful examples of each query, with
    the columns of :meth:`tda_lightning.Scores.to_pandas`. ``tda/training`` has a row for each
    training example (:func:`~tda_lightning.exports.training_table`); it is left out where columns
    are edits or only candidates were scored.

    Args:
        k: examples of each kind.
        render: shows examples (a data module's ``render``): the pairs then have the columns
            ``query_example`` and ``train_example``, pictures as ``wandb.Image``.

    Raises:
        ImportError: wandb is not installed.
        ValueError: ``k`` is below 1.
    """
    package = needed("wandb", "wandb", "wandb_tables")
    pairs = long_rows(scores, range(len(scores)), k)
    columns = {name: values.tolist() for name, values in pairs.items()}
    if render is not None and "train" in columns:
        for side in ("query", "train"):
            shown = {index: _shown(package, render(side, index)) for index in {*columns[side]}}
            columns[f"{side}_example"] = [shown[index] for index in columns[side]]
    tables = {"tda/pairs": _table(package, columns)}
    if "edits" not in scores.provenance and scores.is_complete:
        examples = {name: values.tolist() for name, values in training_table(scores).items()}
        tables["tda/training"] = _table(package, examples)
    return tables


def _table(package: Any, columns: dict[str, list[Any]]) -> Any:
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return package.Table(columns=list(columns), data=rows)


def _shown(package: Any, example: Rendered) -> Any:
    if example.image is None:
        return example.text or example.caption or str(dict(example.row or {}))
    pixels = np.asarray(example.image)
    if pixels.ndim == 3 and pixels.shape[0] == 3 != pixels.shape[2]:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        if low < 0 or high > 1:  # as Rendered has it: stretched to the full range
            pixels = (pixels - low) / max(high - low, 1e-12)
        pixels = (pixels * 255).round()
    return package.Image(pixels.astype(np.uint8), caption=example.caption)
