"""How much of an estimator's scores an index keeps, by bytes per example and by compression.

python -m experiments.index.run fashion_mnist influence --run FOLDER
python -m experiments.index.run wikitext2_gpt source --run FOLDER

The runs and the retrained models are those of experiments/fidelity: FOLDER is a run of
``tda train experiment=fidelity/NAME``; of mnli_encoder, results/mnli_encoder.npz has what ``tda
evaluate`` found (README.md). Rows are added to results/NAME_ESTIMATOR.json one by one;
what is there is not done again. python -m experiments.index.table --write makes tables of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from experiments.fidelity import kept as fidelity
from experiments.index.plain_factors import plain_factors
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.cli.recorded_run import load_parts, sources
from tda_lightning.cli.run_config import load_config
from tda_lightning.estimators import Estimator, InfluenceFunction, Source, TracIn
from tda_lightning.evaluation.linear_datamodeling import draw_subsets
from tda_lightning.index.choosing import Samples, fitted
from tda_lightning.index.compression import Compression
from tda_lightning.index.opened import in_session, sampled, training_source
from tda_lightning.index.preparing import drawn
from tda_lightning.index.responses import Responder, responder_of
from tda_lightning.index.rounding import numbers_of, rounded, width_of
from tda_lightning.index.samples import exact_scores, query_coordinates, sample_coordinates
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.session.session import Session

RESULTS = Path(__file__).parent / "results"
ESTIMATORS: dict[str, Estimator] = {
    "influence": InfluenceFunction(),
    "source": Source(),
    "tracin": TracIn(),
}
KINDS = ("factors", "leading", "plain", "random")
# Types of the numbers by bytes an example: with room for larger ones, small ones are not needed.
DTYPES = {
    64: ("int4", "int8"),
    256: ("int4", "int8"),
    1024: ("int4", "int8"),
    4096: ("int8", "float16"),
    16384: ("float16",),
    65536: ("float16",),
}
_MOST_RANDOM = 1 << 14  # numbers: random directions are as large as the model, times their count
_MOST_LEADING = 4096  # of them: principal components need samples as large
_BATCH = 256
_TOGETHER = 8  # batches of examples whose coordinates are held at a time


def main() -> None:
    """The rows of one run and estimator."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problem", help="a study of experiments/fidelity")
    parser.add_argument("estimator", choices=ESTIMATORS)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--bytes", type=int, nargs="*", choices=DTYPES, default=DTYPES)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    study(options)


def study(options: argparse.Namespace) -> None:
    """All rows that are missing."""
    target = RESULTS / f"{options.problem}_{options.estimator}.json"
    found = json.loads(target.read_text()) if target.exists() else {"rows": []}
    wanted = [
        (size, kind, dtype)
        for size in options.bytes
        for kind in options.kinds
        for dtype in DTYPES[size]
        if not any([size, kind, dtype] == row["key"] for row in found["rows"])
    ]
    estimator = ESTIMATORS[options.estimator]
    config = OmegaConf.create(
        {"trust_config": False, "data": {"root": None, "num_query": None}, "config": None}
    )
    data, module, task = load_parts(config, load_config(options.run))
    train, query = sources(data, _BATCH)
    attribution = AttributionModule(module, Trajectory.load(str(options.run)), estimator, task)
    source = training_source(attribution, train, _BATCH)
    queries = ExampleSource.of(query, _BATCH, "query", source.data_module)
    count, everyone = len(source), source.batches(size=_BATCH)
    truth = _truth(options.problem)
    left_out = None if truth is None else ~draw_subsets(count, 0.5, truth.shape[1])
    size = 128
    batches = [
        [part[at : at + size] for at in range(0, len(part), size)]
        for part in (drawn(count, name, 0) for name in ("directions", "components", "judging"))
    ]
    samples = Samples(*batches)
    asked_source = sampled(source, drawn(count, "asked", 0))

    def keep() -> None:
        RESULTS.mkdir(exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n")

    exact = in_session(
        attribution,
        source,
        queries,
        lambda session: exact_scores(session, responder_of(estimator, session), everyone),
    )
    found["num_train"], found["num_query"] = count, len(queries)
    if left_out is not None and truth is not None:
        found["lds"] = float(_lds(exact, left_out, truth).mean())
        found["lds_error"] = _error(_lds(exact, left_out, truth))
    keep()

    def fit(session: Session) -> None:
        responder = responder_of(estimator, session)
        began = time.process_time()
        most = {"random": _MOST_RANDOM // len(responder.terms), "leading": _MOST_LEADING}
        here = [key for key in wanted if width_of(key[0], key[2]) <= most.get(key[1], 1 << 30)]
        ours = [(kind, width_of(size, dtype)) for size, kind, dtype in here if kind != "plain"]
        plain = [width_of(size, dtype) for size, kind, dtype in here if kind == "plain"]
        made = fitted(session, responder, ours, samples, 0)
        made += plain_factors(session, responder, plain, samples.directions)
        here.sort(key=lambda key: key[1] == "plain")
        fit_seconds = time.process_time() - began
        codes = _walked(session, responder, made, [key[2] for key in here])
        before = session.queries, session.num_query
        placed = queries.checked(session.module)
        session.queries = lambda start, stop: _loaded(placed, start, stop, session)
        session.num_query = len(queries)
        coordinates = query_coordinates(session, responder, made)
        session.queries, session.num_query = before
        found["fit_seconds"] = found.get("fit_seconds", 0) + round(fit_seconds, 1)
        for key, own, (numbers, scales), asking in zip(here, made, codes, coordinates, strict=True):
            rows = numbers_of(numbers, key[2], own.width) * torch.from_numpy(scales)[:, None]
            asked = own.asked(asking)
            values = own.dot(asked, rows.to(asked))
            row = _judged(values, exact, left_out, truth)
            found["rows"].append({**row, "key": list(key)})
            keep()
            print(found["rows"][-1], flush=True)

    def _walked(
        session: Session, responder: Responder, made: Sequence[Compression], dtypes: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """What is stored of every training example, by compression: one walk for all."""
        stored: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in made]
        for at in range(0, len(everyone), _TOGETHER):
            batches = everyone[at : at + _TOGETHER]
            parts = sample_coordinates(session, responder, made, batches)
            for rows, own, dtype, part in zip(stored, made, dtypes, parts, strict=True):
                rows += [rounded(own.stored(terms), dtype) for terms in part]
        return [
            (np.concatenate([own[0] for own in rows]), np.concatenate([own[1] for own in rows]))
            for rows in stored
        ]

    in_session(attribution, source, asked_source, fit)


def _loaded(source: ExampleSource, start: int, stop: int, session: Session) -> Any:
    for batch, indices in source.indexed(source.batches(start, stop)):
        yield source.placed(batch, session.module, indices), indices.to(session.device)


def _truth(problem: str) -> Tensor | None:
    """Measurements after retraining on half of the data, [query, subset], the mean over seeds; None
    where nobody has retrained."""
    kept = (fidelity.RESULTS / f"{problem}.npz", RESULTS / f"{problem}.npz")
    for path in kept:
        if path.exists():
            with np.load(path, allow_pickle=False) as found:
                return torch.from_numpy(found["algorithm"]).double().mean(1).T
    return None


def _judged(
    values: Tensor, exact: Tensor, left_out: Tensor | None, truth: Tensor | None
) -> dict[str, float]:
    """How well ``values`` agree with the uncompressed scores, and predict retraining."""
    one, other = (own.double() - own.double().mean(1, keepdim=True) for own in (values, exact))
    agreement = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    judged = {"agreement": float(agreement.mean()), "agreement_error": _error(agreement)}
    if left_out is not None and truth is not None:
        lds = _lds(values, left_out, truth)
        change = lds - _lds(exact, left_out, truth)
        judged |= {"lds": float(lds.mean()), "lds_error": _error(lds)}
        judged |= {"lds_change": float(change.mean()), "lds_change_error": _error(change)}
    for k in (10, 100):
        judged[f"recall_{k}"] = _recall(values, exact, k, k)
        judged[f"reranked_recall_{k}"] = _recall(values, exact, k, min(10 * k, exact.shape[1]))
    return {name: round(value, 4) for name, value in judged.items()}


def _recall(values: Tensor, exact: Tensor, k: int, looked_at: int) -> float:
    """Share of the k strongest proponents among so many strongest by ``values``."""
    best, found = exact.topk(k, dim=1).indices, values.topk(looked_at, dim=1).indices
    return float((best[:, :, None] == found[:, None, :]).any(2).float().mean())


def _lds(values: Tensor, left_out: Tensor, truth: Tensor) -> Tensor:
    """Rank correlation over subsets of predicted and measured, of each query."""
    ranks = [
        own.argsort(1).argsort(1).double() - (own.shape[1] - 1) / 2
        for own in (values.double() @ left_out.double().T, truth)
    ]
    return (ranks[0] * ranks[1]).sum(1) / (ranks[0].norm(dim=1) * ranks[1].norm(dim=1))


def _error(values: Tensor) -> float:
    """Standard error of the mean over queries."""
    return float(values.std() / len(values) ** 0.5)


if __name__ == "__main__":
    main()
