"""Exact per-example gradients, kept factored."""

from tda_lightning.gradients.blocks import Block
from tda_lightning.gradients.composite import Joined, scaled
from tda_lightning.gradients.engine import ExampleGradients, GradientEngine
from tda_lightning.gradients.forms import Dense, Gradient, Outer, matmul_sides

__all__ = [
    "Block",
    "Dense",
    "ExampleGradients",
    "Gradient",
    "GradientEngine",
    "Joined",
    "Outer",
    "matmul_sides",
    "scaled",
]
