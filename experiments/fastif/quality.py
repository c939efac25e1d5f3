"""(b) What depth and batch of the solver buy, and FastIF's time beside that of the full job."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from experiments.fastif.exact import Exact, decay_of, look, query_rows
from experiments.fastif.kept import interval
from experiments.fastif.recorded import NUM_MNLI, Run
from tda_lightning import AttributionModule, Scores
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.curvature import Products
from tda_lightning.estimators import FastInfluence, InfluenceFunction
from tda_lightning.evaluation.linear_datamodeling import rank_correlation
from tda_lightning.session.session import Session
from tda_lightning.solvers import LiSSA, Problem

K = 1000
# Depth and batch, by damping. The paper's: 1000 and 1.
SETTINGS = {
    "paper": ((10, 1), (100, 1), (300, 1), (1000, 1), (10, 8), (100, 8), (10, 64)),
    "none": ((100, 1), (1000, 1), (100, 8)),
}
NUM_SOLVED = 4  # queries
ROUNDS = 2  # of all timed ways, one after another
# The authors' settings of the published recursion (experiments/hans.py of their repository).
DEPTH, PAPER_DAMPING, PAPER_SCALE = 1000, 5e-3, 1e4


def problem_of(context: Session, decay: float, damping: float) -> Problem:
    """The system that a solver is given."""
    size = sum(block.size for block in context.blocks)
    return Problem(
        session=context,
        products=Products("gauss_newton", context),
        decay=torch.full((size,), decay),
        damping=torch.full((size,), damping),
        spectra={},
    )


def quality(run: Run, fast: Scores, exact: Exact) -> dict[str, Any]:
    """By damping and setting: correlation with the exact scores over the candidates, recall of the
    ten largest, relative residual, and seconds."""
    found: dict[str, Any] = {"rows": [], "num_queries": NUM_SOLVED, "k": K}
    asked = Subset(run.queries, range(NUM_SOLVED))
    assert fast.candidates is not None
    candidates = fast.candidates[:NUM_SOLVED, :K]

    def work(context: Session) -> None:
        vectors = query_rows(context)
        plain = problem_of(context, exact.decay, 0.0)
        scale = plain.largest_eigenvalue(1)
        found["scale"], found["decay"] = scale, exact.decay
        found["product_error"] = _product_error(plain, exact, vectors)
        for name, damping in {"paper": PAPER_DAMPING * scale, "none": 0.0}.items():
            problem = problem_of(context, exact.decay, damping)
            truth = exact.scores(damping)[:NUM_SOLVED]
            ekfac = None if name == "paper" else fast.values[:NUM_SOLVED].double()
            if ekfac is not None:
                found["ekfac"] = agreement(ekfac, truth, candidates)
            for depth, batch in SETTINGS[name]:
                began = time.process_time()
                solution = _solved(
                    LiSSA(scale=scale + damping, depth=depth, batch=batch), problem, vectors
                )
                seconds = time.process_time() - began
                scores = exact.products(solution).double() / len(exact.weights)
                row = {"damping": name, "added": damping, "depth": depth, "batch": batch}
                row |= agreement(scores, truth, candidates)
                residual = exact.residuals(damping, solution, vectors)
                row |= {"residual": float(residual.median()), "seconds": seconds / NUM_SOLVED}
                print(row, flush=True)
                found["rows"].append(row)

    look(run, asked, work)
    return found


def times(run: Run) -> dict[str, Any]:
    """Processor and wall seconds of one thread, all in one process, the ways by turns; and whether
    FastIF's scores are those of the full influence function."""
    one, many = Subset(run.queries, range(1)), Subset(run.queries, range(NUM_MNLI))
    ways: dict[str, dict[str, list[float]]] = {}
    found = {"k": K, "num_train": len(run.train), "many": NUM_MNLI, "ways": ways}  # type: ignore[arg-type]
    decay = decay_of(run)

    def attribute(name: str, estimator: Any, queries: Any, trajectory: Any = None) -> Scores:
        attribution = AttributionModule(
            run.module, trajectory or run.trajectory, estimator, run.task
        )
        with timed(ways, name):
            return attribution.attribute(
                run.train, queries, trainer=silent_trainer(), self_influence=False
            )

    def by_lissa(context: Session) -> None:
        scale = problem_of(context, decay, 0.0).largest_eigenvalue(1)
        damping = PAPER_DAMPING * scale
        problem = problem_of(context, decay, damping)
        solver = LiSSA(scale=scale + damping, depth=DEPTH, batch=1)
        with timed(ways, "lissa"):
            solution = _solved(solver, problem, query_rows(context))
        for name, together in (("gradients_in_batches", 256), ("gradients_one_by_one", 1)):
            order = torch.arange(context.num_train).split(together)
            with timed(ways, name):
                parts = _parts(context, solution)
                for batch, examples in context.batches([part.tolist() for part in order]):
                    for block, gradient in context.train_gradients(batch, examples).blocks.items():
                        gradient.dot(parts[block])

    def singles() -> None:
        attribute("fastif_one", FastInfluence(k=K), one)
        attribute("fastif_k100_one", FastInfluence(k=100), one)

    # Features and curvature are kept from ``fast_scores``; the first time of all is no measurement.
    singles()
    ways.clear()
    for _ in range(ROUNDS):
        singles()
        run.restore()
        with timed(ways, "published"):
            scores = published(run.module, run.train, run.queries[0])
        assert bool(scores.isfinite().all())
        singles()
        look(run, one, by_lissa)
        singles()
        attribute("ekfac_one", InfluenceFunction(), one)
        ours = attribute("fastif_many", FastInfluence(k=K), many)
        full = attribute("ekfac_many", InfluenceFunction(), many)
        with tempfile.TemporaryDirectory() as aside:
            # A trajectory with nothing kept: features are gathered and curvature is fitted.
            kept = shutil.ignore_patterns("features", "curvature", "scores")
            bare = shutil.copytree(run.folder, Path(aside) / "bare", ignore=kept)
            attribute("fastif_first", FastInfluence(k=K), one, str(bare))
    assert ours.candidates is not None
    found["same"] = agreement(ours.values.double(), full.values.double(), ours.candidates)
    return found


def published(module: nn.Module, train: Dataset, query: tuple[Tensor, Tensor]) -> Tensor:
    """Influences of all training pairs as the authors compute them, in PyTorch alone: the recursion
    with the Hessian of one random pair at a time, then the gradient of one pair after another."""
    count: int = len(train)  # type: ignore[arg-type]
    parameters = list(module.parameters())

    def gradient(pair: tuple[Tensor, Any], graph: bool = False) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(module(pair[0][None]), torch.as_tensor(pair[1])[None])
        return torch.autograd.grad(loss, parameters, create_graph=graph)

    asked = gradient(query)
    solution = asked
    for place in torch.randint(count, (DEPTH,), generator=torch.Generator().manual_seed(0)):
        slopes = gradient(train[int(place)], graph=True)
        along = torch.stack([(g * h).sum() for g, h in zip(slopes, solution, strict=True)]).sum()
        product = torch.autograd.grad(along, parameters)
        solution = tuple(
            v + (1 - PAPER_DAMPING) * h - p / PAPER_SCALE
            for v, h, p in zip(asked, solution, product, strict=True)
        )
    scores = torch.zeros(count)
    for place in range(count):
        slopes = gradient(train[place])
        along = torch.stack([(g * h).sum() for g, h in zip(slopes, solution, strict=True)]).sum()
        scores[place] = along / PAPER_SCALE / count
    return scores


def agreement(scores: Tensor, truth: Tensor, candidates: Tensor) -> dict[str, Any]:
    """Rank and linear correlation over each query's candidates, and recall of the ten largest of
    *all* training pairs among the ten largest of the candidates."""
    ours, theirs = scores.gather(1, candidates), truth.gather(1, candidates)
    best = truth.topk(10, dim=1).indices
    chosen = candidates.gather(1, ours.topk(10, dim=1).indices)
    hits = (best[:, :, None] == chosen[:, None, :]).any(2).double().mean(1)
    pearson = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(ours, theirs, strict=True)]
    )
    return {
        "spearman": interval(rank_correlation(ours, theirs)),
        "pearson": interval(pearson),
        "recall_at_10": interval(hits),
    }


def _product_error(problem: Problem, exact: Exact, vectors: Tensor) -> float:
    """The library's product with the curvature of 64 pairs against that of their gradients."""
    ours = exact.curved(vectors, slice(0, 64))
    theirs = problem.products.over(vectors, list(range(64)))
    return float((ours - theirs).norm() / theirs.norm())


def _solved(solver: LiSSA, problem: Problem, vectors: Tensor) -> Tensor:
    return solver.solve(problem, vectors)


def _parts(context: Session, solution: Tensor) -> dict[str, Tensor]:
    pieces = solution.split([block.size for block in context.blocks], dim=1)
    return {
        block.name: piece.unflatten(1, block.shape)
        for block, piece in zip(context.blocks, pieces, strict=True)
    }


@contextmanager
def timed(ways: dict[str, dict[str, list[float]]], name: str) -> Iterator[None]:
    """Add what the body takes to ``ways``."""
    processor, wall = time.process_time(), time.perf_counter()
    yield
    kept = ways.setdefault(name, {"processor": [], "wall": []})
    kept["processor"].append(time.process_time() - processor)
    kept["wall"].append(time.perf_counter() - wall)
