"""LDS against the trainings paid for: ensembles of each kind, ours, TRAK's and kronfluence's.

python -m experiments.question.trainings --data-root FOLDER     # train, score, keep
python -m experiments.question.trainings --peers PYTHON ...     # kronfluence too, by that Python

The run is the MNIST network of experiments/fidelity, and so are its retrainings on half of the
data. Of an ensemble the first 1, 2, 3, 5 and 10 members are averaged. What was done is not done
again. ``results/trainings_mnist.npz`` holds for each series LDS [count, query] in both protocols;
``experiments.question.table`` makes the table and the picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.fidelity import kept as fidelity
from experiments.fidelity.run import tda
from experiments.question.kept import RESULTS
from experiments.question.studies import ESTIMATORS
from tda_lightning import AttributionModule, Ensemble, Scores
from tda_lightning.cli.run_config import build, load_config
from tda_lightning.cli.trainers import silent_trainer
from tda_lightning.estimators import TRAK
from tda_lightning.evaluation.linear_datamodeling import draw_subsets, rank_correlation

RUN = Path("runs/question/mnist")
FILE = RESULTS / "trainings_mnist.npz"
COUNTS = (1, 2, 3, 5, 10)
SUBSETS = 100
MEMBERS = {"seeds": 10, "forks": 10, "dropout": 10, "lora": 5}
SETTINGS = ESTIMATORS | {"trak": ["estimator=trak"]}


@dataclass(frozen=True)
class Series:
    """An estimator over a kind of ensemble; the derivative taken at ``keep``."""

    estimator: str
    kind: str
    keep: float

    def __str__(self) -> str:
        return f"{self.estimator}@{self.keep:g}+{self.kind}"


SERIES = (
    *(Series("influence", kind, keep) for kind in MEMBERS for keep in (1, 0.5)),
    *(Series("source_blocks", kind, 0.5) for kind in ("seeds", "forks", "dropout")),
    *(Series("tracin", kind, 1) for kind in ("seeds", "dropout", "lora")),
)
POOLED = tuple(Series("trak", kind, 1) for kind in ("seeds", "dropout", "lora"))
OUTSIDE, OUTSIDE_MEMBERS = Series("kronfluence", "seeds", 1), 5


def main() -> None:
    """What is missing of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True, help="folder of the data sets")
    parser.add_argument("--peers", help="the Python of experiments/peers' environment")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    common = [f"threads={options.threads}"]
    if not (RUN / "config.yaml").exists():
        root = f"data.root={options.data_root}"
        tda("train", "experiment=fidelity/mnist", "name=question/mnist", root, *common)
    for series in SERIES:
        if str(series) not in done():
            make(series.kind, MEMBERS[series.kind], common)
            scores = score(series, RUN / "ensemble" / series.kind, common)
            assert scores.members is not None
            keep(series, first_members([sums(part) for part in scores.members]))
    for series in POOLED:
        if str(series) not in done():
            keep(series, pooled(series, common))
    counts = [count for count in COUNTS if count <= OUTSIDE_MEMBERS]
    if options.peers is not None and read()[1].get(str(OUTSIDE)) != counts:
        keep(OUTSIDE, first_members(outside(options.peers, common)))


def make(kind: str, members: int, common: Sequence[str]) -> None:
    """An ensemble, or what is missing of it."""
    tda("ensemble", f"trajectory={RUN}", f"kind={kind}", f"members={members}", *common)


def score(series: Series, of: Path, common: Sequence[str]) -> Scores:
    """By ``tda attribute``; kept in a file."""
    file = RUN / "scores" / f"{series}.h5"
    if not file.exists():
        at = [] if series.keep == 1 else [f"keep={series.keep:g}"]
        tda(
            "attribute",
            f"trajectory={of}",
            *SETTINGS[series.estimator],
            *at,
            f"scores='{file}'",
            "self_influence=false",
            *common,
        )
    return Scores.load(file)


def first_members(of_each: Sequence[Tensor]) -> dict[int, Tensor]:
    """Means over the first members, by how many."""
    return {k: torch.stack([*of_each[:k]]).mean(0) for k in COUNTS if k <= len(of_each)}


def pooled(series: Series, common: Sequence[str]) -> dict[int, Tensor]:
    """TRAK, whose average is no mean of members' scores, over the first members of an ensemble, by
    how many: sums [query, subset]."""
    make(series.kind, MEMBERS[series.kind], common)
    recorded = load_config(RUN)
    data = build(recorded.data, trust=False)
    module = build(recorded.model, trust=False, optimizer=None, scheduler=None)
    task = build(recorded.task, trust=False)
    members = Ensemble.load(RUN / "ensemble" / series.kind).trajectories
    found = {}
    for count in COUNTS:
        if count > len(members):
            break
        of = members[0] if count == 1 else Ensemble(members[:count])
        scores = AttributionModule(module, of, TRAK(), task).attribute(
            data.train_dataset, data.query_dataset, trainer=silent_trainer(), self_influence=False
        )
        found[count] = sums(scores.values)
    return found


def outside(python: str, common: Sequence[str]) -> list[Tensor]:
    """kronfluence's EK-FAC influence of each seed's run: sums [query, subset]."""
    make("seeds", OUTSIDE_MEMBERS, common)
    found = []
    others = [RUN / "ensemble" / "seeds" / f"member-{k}" for k in range(2, OUTSIDE_MEMBERS + 1)]
    for folder in (RUN, *others):
        file = folder / "kronfluence.h5"
        if not file.exists():
            if not (folder / "config.yaml").exists():
                (folder / "config.yaml").write_bytes((RUN / "config.yaml").read_bytes())
            command = [python, "-m", "experiments.peers.kronfluence", str(folder)]
            subprocess.run([*command, "--output", str(file), "--threads", "1"], check=True)
        found.append(sums(Scores.load(file).values))
    return found


def sums(values: Tensor) -> Tensor:
    """What the scores [query, train] predict of each subset: float64 [query, subset]."""
    left_out = ~draw_subsets(values.shape[1], 0.5, SUBSETS)
    return values.double() @ left_out.double().T


def keep(series: Series, means: Mapping[int, Tensor]) -> None:
    """Add a series to the results: LDS [count, query] of its sums, by how many members."""
    arrays, about = read()
    with np.load(fidelity.RESULTS / "mnist.npz", allow_pickle=False) as kept:
        truths = {
            "single_run": torch.from_numpy(kept["single_run"]).double()[:, 0].T,
            "algorithm": torch.from_numpy(kept["algorithm"]).double().mean(1).T,
        }
    for protocol, truth in truths.items():
        lds = [rank_correlation(mean[:, : truth.shape[1]], truth) for mean in means.values()]
        arrays[f"{protocol}-{series}"] = torch.stack(lds).float().numpy()
    about[str(series)] = list(means)
    RESULTS.mkdir(exist_ok=True)
    aside = FILE.with_suffix(".part.npz")
    np.savez_compressed(aside, about=json.dumps(about), **arrays)
    aside.replace(FILE)


def done() -> set[str]:
    """Names of the series in the results."""
    return set(read()[1])


def read() -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """LDS [count, query] by protocol and series; the counts of each series."""
    if not FILE.exists():
        return {}, {}
    with np.load(FILE, allow_pickle=False) as found:
        arrays = {key: found[key] for key in found.files if key != "about"}
        return arrays, json.loads(str(found["about"]))


if __name__ == "__main__":
    main()
