"""What a study found, in a file that grows: rows and truths of earlier sessions stay.

An npz file without pickles; the subsets of a share are those of ``draw_subsets(num_train, share,
count)``, the seed 0. SHARE are those with a retraining, and 0.5::

    recorded                float32 [query], measurements at the end of the recorded run
    single_run-SHARE        float32 [subset, query], after each replay
    algorithm-SHARE         float32 [subset, seed, query], after each training anew
    removed-SHARE           float16 [row, query, subset], sums of scores over what a subset leaves
                            out, in multiples of unit-SHARE; of ensembles for 0.95 and 0.5 alone
    unit-SHARE              float64 [row, query]
    first-ROW               float32 [protocol, count, query], of an ensemble: LDS, half kept, of the
                            means over its first 1, 2, 3 and 5 members
    about                   a JSON object: rows (names), seconds of each, num_train, versions

The truths with half kept are those of experiments/fidelity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.fidelity import kept as fidelity
from experiments.question.studies import SHARES, Study, rows
from tda_lightning import Scores
from tda_lightning.cli.run_config import versions
from tda_lightning.evaluation.linear_datamodeling import draw_subsets, rank_correlation
from tda_lightning.store.ground_truth_file import read_ground_truth

RESULTS = Path(__file__).parent / "results"
COUNTS = (1, 2, 3, 5)  # members of an ensemble
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Kept:
    """One study's results.

    Attributes:
        removed: by share: float64 [query, subset] by row.
        first: by row of an ensemble and protocol: LDS [count, query], half kept, by ``COUNTS``.
        truth: by protocol and share: [query, subset], the mean over seeds.
        seeds: of the algorithm, by share: [seed, query, subset].
        recorded: [query]; None before the first retraining.
        about: see above.
    """

    removed: dict[float, dict[str, Tensor]]
    first: dict[tuple[str, str], Tensor]
    truth: dict[tuple[str, float], Tensor]
    seeds: dict[float, Tensor]
    recorded: Tensor | None
    about: dict[str, Any]


def keep(name: str, study: Study, folder: Path) -> None:
    """Add what is in ``folder`` to the results of a study."""
    arrays, about = _read(name)
    for protocol, share in study.truths:
        file = folder / "ground_truth" / f"{protocol}-{share:g}-0.h5"
        if f"{protocol}-{share:g}" in arrays or not file.exists():
            continue
        truth = read_ground_truth(file).finished()
        if len(truth.subsets) < study.subsets / 2:
            continue  # interrupted too early
        truth = truth.first(min(len(truth.subsets), study.subsets), truth.seeds.shape[1])
        outcomes = truth.outcomes[:, 0] if protocol == "single_run" else truth.outcomes
        arrays[f"{protocol}-{share:g}"] = outcomes.float().numpy()
        arrays["recorded"] = truth.baseline.float().numpy()
        about.setdefault("retraining_seconds", {})[f"{protocol}-{share:g}"] = float(
            truth.seconds.sum()
        )
    for row, asked in rows(study).items():
        file = folder / "scores" / f"{row}.h5"
        if row not in about["rows"] and file.exists():
            found = Scores.load(file)
            _add(arrays, about, row, found.values, found.provenance, study)
            if asked.ensemble is not None:
                assert found.members is not None
                left_out = ~draw_subsets(found.num_train, 0.5, study.subsets)
                sums = found.members.double() @ left_out.double().T
                arrays[f"first-{row}"] = first_members(name, sums)
    about["versions"] = versions()
    RESULTS.mkdir(exist_ok=True)
    aside = RESULTS / f"{name}.part.npz"
    np.savez_compressed(aside, about=json.dumps(about), **arrays)
    aside.replace(RESULTS / f"{name}.npz")


def _add(
    arrays: Arrays,
    about: dict[str, Any],
    row: str,
    values: Tensor,
    provenance: Mapping[str, Any],
    study: Study,
) -> None:
    about["rows"].append(row)
    about["num_train"] = values.shape[1]
    about["seconds"][row] = provenance.get("processor_seconds")
    for share in shares(study):
        if not row_has(row, share):
            continue
        left_out = ~draw_subsets(values.shape[1], share, study.subsets)
        sums = (values.double() @ left_out.double().T).numpy()
        unit = np.abs(sums).max(1).clip(1e-300)
        scaled = (sums / unit[:, None]).astype(np.float16)
        for key, part in (("removed", scaled), ("unit", unit)):
            before = [arrays[f"{key}-{share:g}"]] if f"{key}-{share:g}" in arrays else []
            arrays[f"{key}-{share:g}"] = np.concatenate([*before, part[None]])


def shares(study: Study) -> list[float]:
    """Of which sums of scores are kept: half, and those with a retraining."""
    asked = {0.5, *(share for _, share in study.truths)}
    return [share for share in SHARES if share in asked]


def row_has(row: str, share: float) -> bool:
    """Whether sums of a row's scores are kept for a share: of ensembles the tables show two."""
    return "+" not in row or share in (0.95, 0.5)


def first_members(name: str, sums: Tensor) -> NDArray[Any]:
    """LDS [protocol, count, query], half kept, of means over the first members, from the sums of
    scores [member, query, subset] of each."""
    truths = [seeds.mean(0) for seeds in half_kept(name).values()]
    means = [sums[:count].mean(0) for count in COUNTS if count <= len(sums)]
    lds = [
        torch.stack([rank_correlation(mean[:, : truth.shape[1]], truth) for mean in means])
        for truth in truths
    ]
    return torch.stack(lds).float().numpy()


def half_kept(name: str) -> dict[str, Tensor]:
    """The truths of experiments/fidelity by protocol: [seed, query, subset]."""
    with np.load(fidelity.RESULTS / f"{name}.npz", allow_pickle=False) as found:
        truths = {protocol: torch.from_numpy(found[protocol]) for protocol in fidelity.PROTOCOLS}
    return {protocol: truth.double().permute(1, 2, 0) for protocol, truth in truths.items()}


def has_row(name: str, row: str) -> bool:
    """Whether a row is in the results."""
    return row in _read(name)[1]["rows"]


def has_truth(name: str, protocol: str, share: float) -> bool:
    """Whether a truth is in the results."""
    return f"{protocol}-{share:g}" in _read(name)[0]


def load(name: str) -> Kept:
    """The kept results of a study, with the truths of experiments/fidelity."""
    arrays, about = _read(name)
    removed, first, truth, seeds = {}, {}, {}, {}
    for protocol, outcomes in half_kept(name).items():
        truth[protocol, 0.5] = outcomes.mean(0)
        if protocol == "algorithm":
            seeds[0.5] = outcomes
    for key, found in arrays.items():
        kind, _, share = key.partition("-")
        if kind == "first":
            for protocol, lds in zip(fidelity.PROTOCOLS, found, strict=True):
                first[share, protocol] = torch.from_numpy(lds).double()
        elif kind == "removed":
            values = torch.from_numpy(found).double() * torch.from_numpy(
                arrays[f"unit-{share}"][..., None]
            )
            names = [row for row in about["rows"] if row_has(row, float(share))]
            removed[float(share)] = dict(zip(names, values, strict=True))
        elif kind == "single_run":
            truth[kind, float(share)] = torch.from_numpy(found).double().T
        elif kind == "algorithm":
            seeds[float(share)] = torch.from_numpy(found).double().permute(1, 2, 0)
            truth[kind, float(share)] = seeds[float(share)].mean(0)
    recorded = torch.from_numpy(arrays["recorded"]).double() if "recorded" in arrays else None
    return Kept(removed, first, truth, seeds, recorded, about)


def _read(name: str) -> tuple[Arrays, dict[str, Any]]:
    file = RESULTS / f"{name}.npz"
    if not file.exists():
        return {}, {"rows": [], "seconds": {}}
    with np.load(file, allow_pickle=False) as found:
        arrays = {key: found[key] for key in found.files if key != "about"}
        return arrays, json.loads(str(found["about"]))
