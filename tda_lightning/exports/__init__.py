"""Scores for other tools: tables, labelled arrays, label issues, dashboards."""

from __future__ import annotations

from tda_lightning.exports.arrays import to_xarray
from tda_lightning.exports.fiftyone_fields import add_to_fiftyone
from tda_lightning.exports.frames import to_pandas, to_parquet
from tda_lightning.exports.label_issues import label_issues, label_quality
from tda_lightning.exports.training_examples import training_table
from tda_lightning.exports.wandb_tables import wandb_tables

__all__ = [
    "add_to_fiftyone",
    "label_issues",
    "label_quality",
    "to_pandas",
    "to_parquet",
    "to_xarray",
    "training_table",
    "wandb_tables",
]
