"""The kinds of compression, by their names in files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tda_lightning.index.compression import Compression
from tda_lightning.index.directions import LeadingCoordinates
from tda_lightning.index.factors import FactorPairs
from tda_lightning.index.random_projection import RandomProjection

COMPRESSIONS: Mapping[
    str, type[LeadingCoordinates] | type[FactorPairs] | type[RandomProjection]
] = {kind.kind: kind for kind in (LeadingCoordinates, FactorPairs, RandomProjection)}


def restored(kind: str, tensors: Mapping[str, Tensor]) -> Compression:
    """The compression that a file holds.

    Raises:
        ValueError: of another kind, or tensors that do not belong together.
    """
    if kind not in COMPRESSIONS:
        raise ValueError(f"an unknown kind of compression, {kind[:40]!r}")
    return COMPRESSIONS[kind].restored(tensors)
