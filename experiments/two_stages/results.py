"""What the table needs, kept beside it: outcomes of retraining, and ranks of the predictions.

``results/two_stages.npz``: ``outcomes_PROTOCOL`` float32 [subset, seed, query], the queries' losses
after retraining; ``ranks`` uint8 [estimator, query, subset], of the sums of the scores of what each
subset keeps, ranked among the subsets to judge by and among those for validation, apart.
``results/two_stages.json``: the rest, readable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from tda_lightning.store.atomic_write import write_text


@dataclass(frozen=True)
class Results:
    """Everything that the table is made of.

    Attributes:
        outcomes: by protocol, losses after retraining [subset, seed, query].
        ranks: by estimator, of what it predicts for each subset [query, subset].
        seconds: that each estimator took.
        judging: so many subsets, the first ones, are to judge by; the rest is for validation.
        dampings: those tried.
        default_damping: the one that is used when none is chosen.
        facts: what else was found and with what: sizes, accuracies, versions.
    """

    outcomes: Mapping[str, Tensor]
    ranks: Mapping[str, Tensor]
    seconds: Mapping[str, float]
    judging: int
    dampings: tuple[float, ...]
    default_damping: float
    facts: Mapping[str, Any]


def ranked(predicted: Tensor, judging: int) -> Tensor:
    """Ranks of predictions [query, subset] among the first ``judging``, and among the others."""
    parts = [predicted[:, :judging], predicted[:, judging:]]
    ranks = [rankdata(part.numpy(), method="ordinal", axis=1) - 1 for part in parts]
    return torch.from_numpy(np.concatenate(ranks, axis=1).astype(np.uint8))


def write(folder: Path, results: Results) -> None:
    """Both files, aside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"outcomes_{name}": t.float().numpy() for name, t in results.outcomes.items()}
    arrays["ranks"] = torch.stack(list(results.ranks.values())).numpy()
    keep(folder / "two_stages.npz", **arrays)
    about = {
        "estimators": list(results.ranks),
        "seconds": dict(results.seconds),
        "judging": results.judging,
        "dampings": list(results.dampings),
        "default_damping": results.default_damping,
        "facts": dict(results.facts),
    }
    write_text(folder / "two_stages.json", json.dumps(about, indent=1) + "\n")


def keep(path: Path, **arrays: Any) -> None:
    """A compressed npz file, aside and renamed."""
    aside = path.with_name(f"{path.name}.part")
    with aside.open("wb") as file:
        np.savez_compressed(file, **arrays)
    aside.replace(path)


def read(folder: Path) -> Results:
    """What :func:`write` wrote."""
    about = json.loads((folder / "two_stages.json").read_text())
    with np.load(folder / "two_stages.npz", allow_pickle=False) as arrays:
        outcomes = {
            name.removeprefix("outcomes_"): torch.from_numpy(arrays[name])
            for name in arrays.files
            if name.startswith("outcomes_")
        }
        ranks = torch.from_numpy(arrays["ranks"])
    return Results(
        outcomes=outcomes,
        ranks=dict(zip(about["estimators"], ranks, strict=True)),
        seconds=about["seconds"],
        judging=about["judging"],
        dampings=tuple(about["dampings"]),
        default_damping=about["default_damping"],
        facts=about["facts"],
    )
