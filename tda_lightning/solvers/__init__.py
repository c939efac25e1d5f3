"""Matrix-free solvers of (C + D) h = v, one per file, named as in their papers."""

from tda_lightning.solvers.astra import ASTRA
from tda_lightning.solvers.cg import ConjugateGradients
from tda_lightning.solvers.datainf import DataInf
from tda_lightning.solvers.direct import Direct
from tda_lightning.solvers.lanczos import Lanczos
from tda_lightning.solvers.lissa import LiSSA
from tda_lightning.solvers.problem import Problem, Solver, norms

__all__ = [
    "ASTRA",
    "ConjugateGradients",
    "DataInf",
    "Direct",
    "Lanczos",
    "LiSSA",
    "Problem",
    "Solver",
    "norms",
]
