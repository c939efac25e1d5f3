"""Score the runs of experiments/fidelity by every solver, and judge.

python -m experiments.solvers.run                        # all studies
python -m experiments.solvers.run concrete --runs FOLDER

Nothing is trained: the runs and their ground truths are those that experiments.fidelity.run makes.
Scores are kept in runs/solvers/STUDY, what exists is not made again. The outcome is written to
experiments/solvers/results, which experiments.solvers.table reads.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from experiments.fidelity.kept import truths, write
from experiments.solvers.studies import STUDIES, Study
from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.cli.run_config import build, load_config, versions
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.evaluation import GroundTruth

TARGET = Path("runs/solvers")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """The studies that are named, or all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--runs", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.studies:
        if name not in STUDIES:
            parser.error(f"expected studies among {', '.join(STUDIES)}, got {name}")
    for name in options.studies or STUDIES:
        score(STUDIES[name], options.runs / name, TARGET / name)
        keep(name, options.runs / name, TARGET / name)


def score(study: Study, run: Path, target: Path) -> None:
    """By every solver with every damping."""
    target.mkdir(parents=True, exist_ok=True)
    for name, dampings in study.dampings.items():
        for damping in dampings:
            file = target / f"{name}-{damping}.h5"
            if file.exists():
                continue
            print(f"{file} ...", flush=True)
            mean = mean_eigenvalue(target)
            multiple = float(damping)
            estimator = InfluenceFunction(
                damping=None if mean is None else multiple * mean,
                relative_damping=multiple if mean is None else None,
                solver=study.solver(name),
            )
            found = solved(study, run, estimator, file)
            print(f"{file} took {found.provenance['processor_seconds']:.1f} s", flush=True)


def mean_eigenvalue(target: Path) -> float | None:
    """Of the Gauss-Newton matrix, known once conjugate gradients had a damping relative to it."""
    for file in sorted(target.glob("cg-*.h5")):
        multiple = float(file.stem.partition("-")[2])
        return float(Scores.load(file).provenance["solver"]["damping"]) / multiple
    return None


def solved(study: Study, run: Path, estimator: InfluenceFunction, file: Path) -> Scores:
    """The scores of one solver, written to ``file``."""
    recorded = load_config(run)
    data = build(recorded.data, trust=False)
    module = build(recorded.model, trust=False, optimizer=None, scheduler=None)
    attribution = AttributionModule(
        module, Trajectory.load(str(run)), estimator, build(recorded.task, trust=False)
    )
    queries = data.query_dataset
    return attribution.attribute(
        train=data.train_dataset,
        query=Subset(queries, range(study.queries or len(queries))),
        batch_size=study.batch_size,
        trainer=silent_trainer(),
        scores_path=str(file),
        self_influence=False,
    )


def keep(name: str, run: Path, target: Path) -> None:
    """Judge, and write what the tables need."""
    files = sorted(target.glob("*.h5"))
    scores = {path.stem: Scores.load(path) for path in files}
    count = len(next(iter(scores.values())).values)
    told = {
        key: about(found, scores.get(f"cg-{key.partition('-')[2]}"))
        for key, found in scores.items()
    }
    # EK-FAC's residual is that of its answer as a solver's start.
    for key in [key for key in scores if key.startswith("start-")]:
        own = key.replace("start", "ekfac")
        told[own]["residual"] = told.pop(key)["residual"]
        del scores[key]
    layers = Scores.load(run / "scores" / "influence-0.1.h5")
    scores["layers"] = replace(layers, values=layers.values[:count], self_influence=None)
    told["layers"] = about(scores["layers"], None)
    judged, chosen = (
        {p: first_queries(truth, count) for p, truth in truths(run, seed).items()}
        for seed in (0, 1)
    )
    settings: dict[str, Any] = {"scores": list(scores), "told": told, "versions": versions()}
    settings["mean_eigenvalue"] = mean_eigenvalue(target)
    write(RESULTS / f"{name}.npz", scores, judged, chosen, settings)


def about(found: Scores, exact: Scores | None) -> dict[str, object]:
    """Costs and exactness of some scores, beside those of the exact solve with that damping."""
    solver = found.provenance.get("solver") or {}
    residual = solver.get("relative_residual") or {}
    products = solver.get("products")
    return {
        "seconds": found.provenance["processor_seconds"],
        "walks": products and products / len(found.values),
        "residual": residual.get("max"),
        "correlation": None if exact is None else correlation(found, exact),
    }


def correlation(found: Scores, exact: Scores) -> float:
    """Pearson's, of each query's scores over the training set; the mean over queries."""
    pairs = zip(found.values.double(), exact.values.double(), strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in pairs]).mean())


def first_queries(truth: GroundTruth, count: int) -> GroundTruth:
    """The ground truth of the first queries alone."""
    return replace(
        truth,
        outcomes=truth.outcomes[..., :count],
        baseline=truth.baseline[:count],
        classes=None,
    )


if __name__ == "__main__":
    main()
