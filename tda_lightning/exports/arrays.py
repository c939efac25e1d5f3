"""Scores as a labelled data set of xarray."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tda_lightning.exports.packages import needed
from tda_lightning.records.provenance import well_formed
from tda_lightning.records.scores import Scores

if TYPE_CHECKING:
    import xarray

_DIMENSIONS = {
    "values": ("query", "train"),
    "by_segment": ("segment", "query", "train"),
    "self_influence": ("train",),
    "by_token": ("query", "train", "position"),
    "candidates": ("query", "candidate"),
    "members": ("member", "query", "train"),
}


def to_xarray(scores: Scores) -> xarray.Dataset:
    """See :meth:`tda_lightning.Scores.to_xarray`."""
    package = needed("xarray", "xarray", "to_xarray")
    arrays: dict[str, Any] = {}
    for name, dimensions in _DIMENSIONS.items():
        tensor = getattr(scores, name)
        if tensor is not None:
            # "values" is a method of a Dataset.
            arrays["score" if name == "values" else name] = (dimensions, tensor.numpy())
    made = well_formed(scores.provenance)
    coordinates: dict[str, Any] = {
        "query": scores.query_indices,
        "train": list(range(scores.num_train)),
    }
    for name, key in (("measurement", "measurements"), ("prediction", "predictions")):
        values: Any = made.get(key, [])
        if len(values) == scores.num_queries and values:
            coordinates[name] = ("query", values)
    segments = made.get("segments", [])
    if scores.by_segment is not None and len(segments) == len(scores.by_segment):
        coordinates["first_step"] = ("segment", [start for start, _ in segments])
        coordinates["last_step"] = ("segment", [stop for _, stop in segments])
    plain = (str, int, float)
    attributes = {
        # What has no place in a netCDF attribute is there as JSON.
        name: value
        if isinstance(value, plain) and not isinstance(value, bool)
        else json.dumps(value, default=str)
        for name, value in scores.provenance.items()
        if name not in ("measurements", "predictions", "query_indices")
    }
    dataset: xarray.Dataset = package.Dataset(arrays, coordinates, attributes)
    return dataset
