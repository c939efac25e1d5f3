"""Exact per-example gradients, kept factored."""

from tda_lightning.gradients.basis import Basis, Reflections, matmul_sides
from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.composite import Joined, example_scaled, scaled
from tda_lightning.gradients.engine import ExampleGradients, GradientEngine
from tda_lightning.gradients.forms import Dense, Gradient, Outer
from tda_lightning.gradients.moments import SideForm
from tda_lightning.gradients.rows import Rows

__all__ = [
    "Basis",
    "Block",
    "Dense",
    "ExampleGradients",
    "Gradient",
    "GradientEngine",
    "Joined",
    "Outer",
    "Reflections",
    "Rows",
    "SideForm",
    "example_scaled",
    "matmul_sides",
    "scaled",
]
