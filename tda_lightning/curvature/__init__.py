"""Curvature of the training loss, as eigenvalues in a basis that gradients can be turned into."""

from tda_lightning.curvature.deflated import DeflatedSpectrum
from tda_lightning.curvature.fit import check_kind, fit_curvature, unit_matrices, units
from tda_lightning.curvature.leading import LeadingDirections, leading_directions, shared_walk
from tda_lightning.curvature.products import (
    Products,
    as_matrices,
    as_rows,
    as_tensors,
    check_product,
)
from tda_lightning.curvature.recorded import (
    check_statistics,
    curvature_of,
    statistics_provenance,
    uses_statistics,
)
from tda_lightning.curvature.shared_walk import SharedWalk
from tda_lightning.curvature.sides import check_dense_side, eigenbasis, side_forms
from tda_lightning.curvature.spectrum import Spectrum

__all__ = [
    "DeflatedSpectrum",
    "LeadingDirections",
    "Products",
    "SharedWalk",
    "Spectrum",
    "as_matrices",
    "as_rows",
    "as_tensors",
    "check_dense_side",
    "check_kind",
    "check_product",
    "check_statistics",
    "curvature_of",
    "eigenbasis",
    "fit_curvature",
    "leading_directions",
    "shared_walk",
    "side_forms",
    "statistics_provenance",
    "unit_matrices",
    "units",
    "uses_statistics",
]
