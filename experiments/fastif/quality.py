"""(b) What depth and batch of the solver buy, and FastIF's time beside that of the full job."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from experiments.fastif.exact import Exact, decay_of, look, query_rows
from experiments.fastif.kept import interval
from experiments.fastif.recorded import Run
from tda_lightning import AttributionModule, Scores
from tda_lightning.cli.trust import quiet_trainer
from tda_lightning.curvature import Products
from tda_lightning.estimators import FastInfluence, InfluenceFunction
from tda_lightning.evaluation.lds import rank_correlation
from tda_lightning.passes import Context
from tda_lightning.solvers import LiSSA, Problem

K = 1000
# Depth and batch, by damping. The paper's: 1000 and 1.
SETTINGS = {
    "paper": ((10, 1), (100, 1), (300, 1), (1000, 1), (10, 8), (100, 8), (10, 64)),
    "none": ((100, 1), (1000, 1), (100, 8)),
}
NUM_SOLVED = 4  # queries
DEPTHS = (100, 200, 1000)  # timed, to see that time is linear in them
PAPER_DAMPING = 5e-3  # times the scale: the authors' setting in the published recursion


def problem_of(context: Context, decay: float, damping: float) -> Problem:
    """The system that a solver is given."""
    size = sum(block.size for block in context.blocks)
    return Problem(
        context=context,
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

    def work(context: Context) -> None:
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
                scores = (solution @ exact.gradients.T).double() / len(exact.gradients)
                row = {"damping": name, "added": damping, "depth": depth, "batch": batch}
                row |= agreement(scores, truth, candidates)
                residual = exact.residuals(damping, solution, vectors)
                row |= {"residual": float(residual.median()), "seconds": seconds / NUM_SOLVED}
                print(row, flush=True)
                found["rows"].append(row)

    look(run, asked, work)
    return found


def times(run: Run) -> dict[str, Any]:
    """Processor seconds of one thread, all in one process, one query unless it says otherwise; and
    whether FastIF's scores are those of the full influence function."""
    found: dict[str, Any] = {"k": K, "num_train": len(run.train), "many": run.mnli.stop}  # type: ignore[arg-type]
    one = Subset(run.queries, range(1))
    many = Subset(run.queries, range(run.mnli.stop))
    decay = decay_of(run)
    made: dict[str, Scores] = {}

    def attribute(name: str, estimator: Any, queries: Any, trajectory: Any = None) -> None:
        attribution = AttributionModule(
            run.module, trajectory or run.trajectory, estimator, run.task
        )
        began = time.process_time()
        made[name] = attribution.attribute(
            run.train, queries, trainer=quiet_trainer(), self_influence=False
        )
        found[name] = time.process_time() - began

    def work(context: Context) -> None:
        scale = problem_of(context, decay, 0.0).largest_eigenvalue(1)
        damping = PAPER_DAMPING * scale
        problem = problem_of(context, decay, damping)
        vectors: list[Tensor] = []
        found["query_gradient"] = _timed(lambda: vectors.append(query_rows(context)))
        solved: list[Tensor] = []
        for depth in DEPTHS:
            solver = LiSSA(scale=scale + damping, depth=depth, batch=1)
            found[f"lissa_{depth}_1"] = _timed(
                lambda solver=solver: solved.append(_solved(solver, problem, vectors[0]))
            )
        for name, size, together in (
            ("all_gradients", context.num_train, 256),
            ("k_gradients", K, 256),
            ("100_gradients_one_by_one", 100, 1),
        ):
            order = [part.tolist() for part in torch.arange(size).split(together)]

            def walk(order: list[list[int]] = order) -> None:
                for batch, examples in context.batches(order):
                    gradients = context.train_gradients(batch, examples)
                    parts = _parts(context, solved[0])
                    for block, gradient in gradients.blocks.items():
                        gradient.dot(parts[block])

            found[name] = _timed(walk)

    look(run, one, work)
    with tempfile.TemporaryDirectory() as aside:
        # A trajectory with nothing kept: features are gathered and curvature is fitted.
        kept = shutil.ignore_patterns("features", "curvature", "scores")
        bare = shutil.copytree(run.folder, Path(aside) / "bare", ignore=kept)
        attribute("fastif_first", FastInfluence(k=K), one, str(bare))
    # From here on the kept ones are used, as by ``fast_scores`` before.
    attribute("fastif_one", FastInfluence(k=K), one)
    attribute("fastif_many", FastInfluence(k=K), many)
    attribute("fastif_k100_one", FastInfluence(k=100), one)
    attribute("ekfac_many", InfluenceFunction(), many)
    ours, full = made["fastif_many"], made["ekfac_many"]
    assert ours.candidates is not None
    found["same"] = agreement(ours.values.double(), full.values.double(), ours.candidates)
    return found


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
    work = solver.solve(problem, vectors)
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def _parts(context: Context, solution: Tensor) -> dict[str, Tensor]:
    pieces = solution.split([block.size for block in context.blocks], dim=1)
    return {
        block.name: piece.unflatten(1, block.shape)
        for block, piece in zip(context.blocks, pieces, strict=True)
    }


def _timed(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
