"""The single-run LDS of each estimator, with EK-FAC, on one recorded run.

With ``left_out`` also leave-one-out; with an estimator called ``unrolled``, how close the others'
scores are to its own.

python experiments/lds/study.py study=digits
python experiments/lds/study.py study=concrete data.root=FOLDER
python experiments/lds/study.py study=concrete data.root=FOLDER retrained=OLDER/outcomes.npz
python experiments/lds/study.py --config-name online study=fashion_mnist data.root=FOLDER
python experiments/lds/study.py --config-name matrix_free study=digits_smooth
python experiments/lds/study.py --config-dir experiments/exactness/conf --config-name exactness
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.evaluation import (
    RemovalAgreement,
    difference,
    draw_subsets,
    landing_error,
    leave_one_out,
    linear_datamodeling_score,
    measure,
    retrain,
    retrain_each,
)

PAIRS = [
    ("unrolled", "recorded"),
    ("unrolled", "source"),
    ("source", "influence"),
    ("source", "tracin"),
    ("recorded", "source"),
    ("recorded", "influence"),
    ("source", "source_blocks"),
    ("recorded", "recorded_blocks"),
    ("source_online", "source_fitted"),
    ("source_corrected", "source_fitted"),
    ("source_leading", "source_fitted"),
    ("influence_online", "influence_fitted"),
    ("influence_corrected", "influence_fitted"),
    ("matrix_free_full", "source"),
    ("matrix_free_full", "matrix_free_layer"),
    ("matrix_free_layer", "source_blocks"),
]


@hydra.main(version_base="1.3", config_path="conf", config_name="lds")
def main(config: DictConfig) -> None:
    """Record a run, score it, retrain it on subsets, and compare."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(config.threads)
    data, module, task = record(config)
    trajectory = Trajectory.load(config.output)

    scores, seconds = {}, {}
    for name, node in config.estimators.items():
        started = time.monotonic()
        attribution = AttributionModule(module, trajectory, instantiate(node), task)
        scores[name] = attribution.attribute(
            data.train_dataset, data.query_dataset, trainer=quiet(), self_influence=False
        )
        seconds[name] = time.monotonic() - started
        if "certificate" in scores[name].provenance:
            print(f"  {name}: {scores[name].provenance['certificate']}")

    subsets, outcomes = truth(config, trajectory, module, task, data)
    found = {
        name: linear_datamodeling_score(item, subsets, outcomes) for name, item in scores.items()
    }
    print(f"\n{config.name}: LDS, single run, {config.fraction:.0%} kept, {len(subsets)} subsets")
    for name, lds in found.items():
        print(f"  {name:<16} {lds}   ({seconds[name]:.1f} s)")
    print_agreement(scores)
    closeness = closeness_to_unrolled(scores)
    single = left_out_singly(config, trajectory, module, task, data, scores)
    gaps = {
        f"{a} - {b}": difference(found[a], found[b]) for a, b in PAIRS if {a, b} <= found.keys()
    }
    for name, gap in gaps.items():
        print(f"  {name:<27} {gap}")
    results = {
        "config": OmegaConf.to_container(config, resolve=True),
        "lds": {name: [lds.value, lds.low, lds.high] for name, lds in found.items()},
        "gaps": {name: [gap.value, gap.low, gap.high] for name, gap in gaps.items()},
        "seconds": seconds,
        "processor_seconds": {
            name: item.provenance["processor_seconds"] for name, item in scores.items()
        },
        "matrix_free": {
            name: item.provenance["matrix_free"]
            for name, item in scores.items()
            if "matrix_free" in item.provenance
        },
        "closeness": closeness,
        "left_out": {
            name: [
                found.slope,
                found.correlation,
                found.rank.value,
                found.rank.low,
                found.rank.high,
            ]
            for name, found in single.items()
        },
        "certificates": {
            name: item.provenance["certificate"]
            for name, item in scores.items()
            if "certificate" in item.provenance
        },
    }
    Path(config.output, "results.json").write_text(json.dumps(results, indent=1))
    # The sum of the scores of what each subset leaves out: what linear.py compares.
    left_out = (~subsets).double()
    np.savez_compressed(
        Path(config.output, "predictions.npz"),
        **{name: (left_out @ item.values.double().T).numpy() for name, item in scores.items()},
    )


def print_agreement(scores: dict[str, Any]) -> None:
    """Correlation with, and slope against, the scores of curvature fitted afterwards."""
    for name, item in scores.items():
        reference = scores.get(f"{name.split('_')[0]}_fitted")
        if reference is not None and reference is not item:
            pair = torch.stack([reference.values.flatten(), item.values.flatten()]).double()
            slope = float(pair[0] @ pair[1] / pair[0].square().sum())
            print(f"  {name:<20} correlation {torch.corrcoef(pair)[0, 1]:.4f}, slope {slope:.3f}")


def closeness_to_unrolled(scores: dict[str, Scores]) -> dict[str, list[float]]:
    """Of each estimator's scores: correlation with the exact ones over all pairs, and the factor
    that fits them best to the exact ones."""
    exact = scores.get("unrolled")
    if exact is None:
        return {}
    found = {}
    for name, item in scores.items():
        pair = torch.stack([item.values.flatten(), exact.values.flatten()]).double()
        slope = float(pair[0] @ pair[1] / pair[0].square().sum())
        found[name] = [float(torch.corrcoef(pair)[0, 1]), slope]
        print(f"  {name:<20} correlation with unrolled {found[name][0]:.4f}, slope {slope:.3f}")
    return found


def left_out_singly(
    config: DictConfig,
    trajectory: Trajectory,
    module: Any,
    task: Any,
    data: Any,
    scores: dict[str, Scores],
) -> dict[str, RemovalAgreement]:
    """Each estimator against retraining without one example at a time."""
    if not config.left_out:
        return {}
    num_train = len(data.train_dataset)
    generator = torch.Generator().manual_seed(config.subset_seed)
    examples = torch.randperm(num_train, generator=generator)[: config.left_out]
    weights = torch.ones(config.left_out + 1, num_train)  # the first run leaves nothing out
    weights[torch.arange(1, config.left_out + 1), examples] = 0
    work = (trajectory, module, task, data.train_dataset)
    outcomes = torch.stack(
        [
            measure(module, task, state, data.query_dataset)
            for state in retrain_each(*work, weights, together=config.together)
        ]
    )
    np.savez_compressed(
        Path(config.output, "left_out.npz"), examples=examples.numpy(), outcomes=outcomes.numpy()
    )
    found = {}
    for name, item in scores.items():
        found[name] = leave_one_out(item, examples, outcomes[1:], outcomes[0])
        print(
            f"  {name:<20} left out singly: slope {found[name].slope:.3f}, correlation "
            f"{found[name].correlation:.4f}, rank {found[name].rank}"
        )
    return found


def record(config: DictConfig) -> tuple[Any, Any, Any]:
    """Train once with the recorder; returns data, module and task."""
    data = instantiate(config.data, _convert_="all")
    data.setup()
    seed_everything(config.seed, verbose=False)
    module = instantiate(config.model, _convert_="all")
    recorder = instantiate(config.recorder, _convert_="all")
    trainer = instantiate(config.trainer, _convert_="all", _partial_=True)
    trainer = trainer(callbacks=[recorder], enable_progress_bar=False)
    trainer.fit(module, datamodule=data)
    told = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
    print(f"{config.name}: {trainer.global_step} steps, {told}")
    return data, module, instantiate(config.task, _convert_="all")


def truth(
    config: DictConfig, trajectory: Trajectory, module: Any, task: Any, data: Any
) -> tuple[Tensor, Tensor]:
    """The subsets, bool [subset, train], and measurements after retraining, [subset, query]."""
    num_train = len(data.train_dataset)
    subsets = draw_subsets(num_train, config.fraction, config.num_subsets, config.subset_seed)
    last = trajectory.checkpoints[trajectory.last_step]
    end = measure(module, task, {**last.buffers, **last.parameters}, data.query_dataset)
    if config.retrained is not None:
        outcomes = known(config.retrained, subsets, end)
    else:
        outcomes = retrained(config, trajectory, module, task, data, subsets)
    np.savez_compressed(
        Path(config.output, "outcomes.npz"),
        subsets=subsets.numpy(),
        outcomes=outcomes.numpy(),
        end=end.numpy(),
    )
    return subsets, outcomes


def retrained(
    config: DictConfig, trajectory: Trajectory, module: Any, task: Any, data: Any, subsets: Tensor
) -> Tensor:
    """Measurements after retraining on each subset, [subset, query]."""
    work = (trajectory, module, task, data.train_dataset)
    landed = retrain(*work, torch.ones(subsets.shape[1]))
    print(f"  replay lands within {landing_error(trajectory, landed):.1e} of the recorded end")
    started = time.monotonic()
    outcomes = torch.stack(
        [
            measure(module, task, state, data.query_dataset)
            for state in retrain_each(*work, subsets.float(), together=config.together)
        ]
    )
    print(f"  {len(subsets)} retrainings in {time.monotonic() - started:.0f} s")
    return outcomes


def known(path: str, subsets: Tensor, end: Tensor) -> Tensor:
    """Measurements after retraining from an earlier study of the same run, to the bit."""
    with np.load(path) as found:
        kept = {name: torch.from_numpy(found[name]) for name in ("subsets", "outcomes", "end")}
    count = len(subsets)
    if not torch.equal(kept["subsets"][:count], subsets) or not torch.equal(kept["end"], end):
        raise ValueError(
            f"{path} comes from another run: expected its subsets and its measurements at the end "
            "of training to be this run's. Leave retrained out to train again."
        )
    return kept["outcomes"][:count]


def quiet() -> Trainer:
    """A trainer for attribution without progress bars."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        inference_mode=False,
    )


if __name__ == "__main__":
    main()
