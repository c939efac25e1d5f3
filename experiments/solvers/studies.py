"""What is solved: the studies, and the solvers with their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tda_lightning.solvers import (
    ASTRA,
    ConjugateGradients,
    DataInf,
    Lanczos,
    LiSSA,
    Solver,
)

# Multiples of the mean eigenvalue of the Gauss-Newton matrix, the same absolute number for every
# solver; 0.1 is the solvers' default.
DAMPINGS = ("0.1", "1", "10", "100")

SOLVERS: dict[str, Solver | None] = {
    "cg": ConjugateGradients(),
    "ekfac": None,
    # EK-FAC's own answer, which is where ASTRA starts, for its residual.
    "start": ASTRA(iterations=1, step=1e-9, batch=1),
    "datainf": DataInf(),
    "lanczos": Lanczos(),
    "cg_ekfac": ConjugateGradients(preconditioner="ekfac"),
    "astra": ASTRA(),
    "lissa": LiSSA(),
}

TITLES = {
    "layers": "EK-FAC, 0.1 of each layer's mean eigenvalue",
    "ekfac": "EK-FAC",
    "cg": "CG",
    "cg_ekfac": "CG, preconditioned by EK-FAC",
    "astra": "ASTRA",
    "lissa": "LiSSA",
    "lanczos": "Lanczos, rank 50",
    "datainf": "DataInf",
}


@dataclass(frozen=True)
class Study:
    """A run of experiments/fidelity, and what of it is solved here.

    Attributes:
        title: for the table.
        dampings: by solver, as many as could be afforded; the first of ``cg`` comes first of all.
        queries: the first so many of the recorded ones; None: all.
        changed: settings of solvers that differ from ``SOLVERS``.
        batch_size: training examples at a time.
    """

    title: str
    dampings: Mapping[str, tuple[str, ...]]
    queries: int | None = None
    changed: Mapping[str, Solver] = field(default_factory=dict)
    batch_size: int = 1024

    def solver(self, name: str) -> Solver | None:
        return self.changed.get(name, SOLVERS[name])


STUDIES = {
    "concrete": Study(
        "Concrete, MLP",
        {
            **dict.fromkeys(("cg", "ekfac", "start", "datainf", "lanczos"), DAMPINGS),
            "cg_ekfac": ("0.1", "1", "10"),
            "astra": ("1", "10"),
            "lissa": ("1", "10", "100"),
        },
    ),
    "fashion_mnist_noisy": Study(
        "FashionMNIST, MLP, 30% random labels, 3 epochs",
        {
            "cg": ("100",),
            "ekfac": DAMPINGS,
            "start": ("100",),
            "datainf": ("100",),
            "lanczos": ("100",),
            "lissa": ("100",),
        },
        queries=40,
        changed={"cg": ConjugateGradients(tolerance=1e-2)},
    ),
    "wikitext2_gpt": Study(
        "WikiText-2, GPT",
        {
            "cg": ("100",),
            "ekfac": DAMPINGS,
            "start": ("100",),
            "datainf": ("100",),
            "lanczos": ("100",),
        },
        queries=12,
        changed={"cg": ConjugateGradients(tolerance=1e-2)},
        batch_size=64,
    ),
}
