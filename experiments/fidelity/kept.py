"""What a study found, in a file small enough to keep with the code: enough for every table.

An npz file without pickles::

    single_run              float32 [subset, query], measurements after each replay
    algorithm               float32 [subset, seed, query], after each training anew
    *_validation            the same for the subsets on which dampings are chosen
    predicted               uint8 [scores, query, subset]: ranks of the sums of scores of what a
                            subset keeps, which are all that a rank correlation looks at
    predicted_validation    the same
    about                   a JSON object: names and seconds of the scores, sizes, versions
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from tda_lightning import Scores, Trajectory
from tda_lightning.cli.run_config import versions
from tda_lightning.evaluation import GroundTruth
from tda_lightning.store.ground_truth_file import read_ground_truth

RESULTS = Path(__file__).parent / "results"
PROTOCOLS = ("single_run", "algorithm")


@dataclass(frozen=True)
class Kept:
    """One study's results.

    Attributes:
        truth: float64 [subset, query], by protocol; the mean over seeds.
        validation: the same on the subsets for choosing.
        predicted: ranks, float64 [query, subset], by name of the scores.
        predicted_validation: the same on the subsets for choosing.
        about: see above.
    """

    truth: dict[str, Tensor]
    validation: dict[str, Tensor]
    predicted: dict[str, Tensor]
    predicted_validation: dict[str, Tensor]
    about: dict[str, Any]


def keep(name: str, folder: Path) -> None:
    """Gather the results of the run in ``folder``."""
    judged, chosen = (truths(folder, seed) for seed in (0, 1))
    files = sorted((folder / "scores").glob("*.h5"))
    scores = {path.stem: Scores.load(path) for path in files}
    seconds = {key: found.provenance.get("processor_seconds") for key, found in scores.items()}
    trajectory = Trajectory.load(str(folder))
    about = {
        "scores": list(scores),
        "seconds": seconds,
        "num_train": next(iter(scores.values())).num_train,
        "num_parameters": sum(
            int(np.prod(fact.shape)) for fact in trajectory.facts.parameters.values()
        ),
        "steps": trajectory.last_step,
        "retraining_seconds": {key: float(t.seconds.sum()) for key, t in judged.items()},
        "versions": versions(),
        "few_left_out": _few_left_out(folder),
    }
    write(RESULTS / f"{name}.npz", scores, judged, chosen, about)


def write(
    file: Path,
    scores: dict[str, Scores],
    judged: dict[str, GroundTruth],
    chosen: dict[str, GroundTruth],
    about: dict[str, Any],
) -> None:
    """The layout above, with the scores in the order of ``about["scores"]``."""
    arrays = {
        **{key: truth.outcomes.numpy() for key, truth in judged.items()},
        **{f"{key}_validation": truth.outcomes.numpy() for key, truth in chosen.items()},
        "predicted": _ranks(scores, judged),
        "predicted_validation": _ranks(scores, chosen),
    }
    file.parent.mkdir(exist_ok=True)
    aside = file.with_name(f"{file.stem}.part.npz")
    floats = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}
    np.savez_compressed(aside, about=json.dumps(about), **floats)
    aside.replace(file)


def load(name: str) -> Kept:
    """The kept results of a study."""
    return read(RESULTS / f"{name}.npz")


def read(file: Path) -> Kept:
    """What :func:`write` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        about = json.loads(str(arrays["about"]))

        def outcomes(suffix: str) -> dict[str, Tensor]:
            found = {p: arrays[f"{p}{suffix}"] for p in PROTOCOLS if f"{p}{suffix}" in arrays}
            return {p: torch.from_numpy(a).double().mean(1) for p, a in found.items()}

        def ranks(key: str) -> dict[str, Tensor]:
            rows = torch.from_numpy(arrays[key]).double()
            return dict(zip(about["scores"], rows, strict=True))

        return Kept(
            outcomes(""),
            outcomes("_validation"),
            ranks("predicted"),
            ranks("predicted_validation"),
            about,
        )


def truths(folder: Path, seed: int) -> dict[str, GroundTruth]:
    """By protocol, what was retrained on the subsets of a seed."""
    files = {p: folder / "ground_truth" / f"{p}-0.5-{seed}.h5" for p in PROTOCOLS}
    found = {p: read_ground_truth(file).finished() for p, file in files.items() if file.exists()}
    # Subsets are drawn one after the other: both protocols have the first ones in common.
    common = min(len(truth.subsets) for truth in found.values())
    return {p: truth.first(common, truth.seeds.shape[1]) for p, truth in found.items()}


def _few_left_out(folder: Path) -> list[dict[str, Any]]:
    """What tda evaluate found with 5% left out, where it was asked (alpha=0.95)."""
    table = folder / "ground_truth" / "single_run-0.95-0.json"
    if not table.exists():
        return []
    rows = json.loads(table.read_text())["rows"]
    return [{key: row[key] for key in ("name", "lds", "over_queries", "slope")} for row in rows]


def _ranks(scores: dict[str, Scores], truths: dict[str, GroundTruth]) -> np.ndarray:
    """uint8 [scores, query, subset]."""
    masks = [truth.subsets for truth in truths.values()]
    if any(not torch.equal(mask, masks[0]) for mask in masks):
        raise ValueError("Both protocols must be judged by the same subsets.")
    kept = masks[0].double()
    rows = [(found.values.double() @ kept.T).numpy() for found in scores.values()]
    # Sums of equal scores differ by rounding alone, which must not rank them.
    rows = [np.round(row / np.abs(row).max(initial=1e-300), 12) for row in rows]
    return np.stack([rankdata(row, method="dense", axis=1) for row in rows]).astype(np.uint8)
