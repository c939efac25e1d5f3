"""Linear datamodeling scores on the losses of generated samples.

A small U-Net is trained on 120 digits, and generates samples. The measurement of a sample is its
loss, a mean over many fixed timesteps and draws of the noise. Truth is training on random halves:

- *replays*: the recorded run with weight 0 on what is left out, so that order, timesteps and noise
  are the same and nothing else changes;
- *another seed*: the same of a run with other initial weights, order, timesteps and noise.

How well the two agree says how much of the truth is not the seed's. What has been trained is kept
in the run's folder, and what has been scored in the results, so that the study can be taken up
again.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments.diffusion.setting import RESULTS, SIZE, samples
from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import InfluenceFunction, Retrac, Source, TracIn, Unrolled
from tda_lightning.estimators.base import Estimator
from tda_lightning.evaluation import (
    draw_subsets,
    interval_over_subsets,
    measure,
    retrain_each,
)
from tda_lightning.evaluation.linear_datamodeling import rank_correlation
from tda_lightning.examples.data import MNISTData
from tda_lightning.examples.models import Denoiser, NoiseSchedule, UNet, cosine
from tda_lightning.tasks import DiffusionTask

DIGITS, EACH, BATCH, QUERIES, SUBSETS, SEEDS = (0, 1, 7), 40, 24, 8, 16, (0, 1)
TIMESTEPS, MEASURED_DRAWS, SCORED_DRAWS = (50, 150, 300, 500, 750), 16, 4
TOGETHER = 16  # runs that are trained at once
ESTIMATORS: dict[str, tuple[Estimator, float]] = {  # with the share that stays
    "influence (EK-FAC)": (InfluenceFunction(), 1.0),
    "TracIn": (TracIn(), 1.0),
    "ReTrac": (Retrac(), 1.0),
    "SOURCE": (Source(num_segments=2, leading_directions=0), 1.0),
    "influence (EK-FAC), keep=0.5": (InfluenceFunction(), 0.5),
    "SOURCE, keep=0.5": (Source(num_segments=2, leading_directions=0), 0.5),
    "TracIn, keep=0.5": (TracIn(), 0.5),
    "exact unrolling": (Unrolled(), 1.0),
    "exact unrolling, keep=0.5": (Unrolled(), 0.5),
}


def run(root: str, folder: Path, epochs: int = 150) -> None:
    """Train, train again on subsets, score, and keep what was measured."""
    torch.set_num_threads(1)
    data, kept = images(root), RESULTS / "retrainings.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"lds": {}}
    chosen = draw_subsets(len(data), 0.5, SUBSETS, seed=0)
    module, trajectory, seconds = recorded(folder, data, SEEDS[0], epochs)
    queries = TensorDataset(samples(module, QUERIES, channels=1))
    every, again = [], []
    for seed in SEEDS:
        outcomes, spent = retrained(folder, data, seed, epochs, chosen, queries)
        every.append(outcomes)
        again.append(spent)
    same, other = every
    agreement = rank_correlation(same.T, other.T)
    found["setup"] = {
        "train": len(data),
        "size": SIZE,
        "steps": trajectory.last_step,
        "subsets": SUBSETS,
        "queries": QUERIES,
        "timesteps": len(TIMESTEPS),
        "measured_draws": MEASURED_DRAWS,
        "scored_draws": SCORED_DRAWS,
        "agreement": float(agreement.mean()),
        "agreement_of_queries": agreement.tolist(),
        "outcome": float(same.mean()),
        "spread": float(same.std(0).mean()),
        "training_seconds": seconds,
        "retraining_seconds": sum(again) / len(again) / SUBSETS,
    }
    write(kept, found)
    task = DiffusionTask(timesteps=TIMESTEPS, draws=SCORED_DRAWS)
    for name, (estimator, keep) in ESTIMATORS.items():
        if name in found["lds"]:
            continue
        began = time.process_time()
        scores = AttributionModule(module, str(place(folder, SEEDS[0])), estimator, task).attribute(
            data, queries, batch_size=len(data), self_influence=False, keep=keep
        )
        spent = time.process_time() - began
        rows = [interval_over_subsets(scores, chosen, outcomes) for outcomes in every]
        found["lds"][name] = [[row.value, row.low, row.high] for row in rows] + [spent]
        print(name, found["lds"][name], flush=True)
        write(kept, found)


def images(root: str) -> TensorDataset:
    """Digits of 8 x 8 pixels in -1 .. 1."""
    train, _ = MNISTData(root=root).read()
    pixels = torch.from_numpy(train.images).float() / 127.5 - 1
    pixels = F.avg_pool2d(F.pad(pixels[:, None], (2, 2, 2, 2), value=-1.0), 32 // SIZE)
    chosen = [(torch.from_numpy(train.labels) == d).nonzero().squeeze(1)[:EACH] for d in DIGITS]
    return TensorDataset(pixels[torch.cat(chosen)])


def network() -> Denoiser:
    """18,000 weights. With predictions of v all samples are images after 750 steps; with those of
    the noise a third of them are noise after 1500."""
    optimizer = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01)
    schedule = NoiseSchedule(1000, prediction_type="v_prediction")
    return Denoiser(UNet(1, (8, 16)), schedule, optimizer, partial(cosine, warmup=0.05))


def place(folder: Path, seed: int) -> Path:
    """Where the run of a seed is."""
    return folder / f"seed{seed}"


def recorded(
    folder: Path, data: TensorDataset, seed: int, epochs: int
) -> tuple[Denoiser, Trajectory, float]:
    """The module at the end of the run of a seed, the run, and its processor time."""
    own, timed = place(folder, seed), place(folder, seed) / "seconds.json"
    seed_everything(seed, verbose=False)
    module = network()
    if not timed.exists():
        began = time.process_time()
        Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[TrajectoryRecorder(str(own), num_checkpoints=8)],
        ).fit(module, DataLoader(data, BATCH, shuffle=True))
        write(timed, time.process_time() - began)
    trajectory = Trajectory.load(str(own))
    module.load_state_dict(trajectory.checkpoints[trajectory.last_step].parameters, strict=False)
    return module.eval(), trajectory, json.loads(timed.read_text())


def retrained(
    folder: Path,
    data: TensorDataset,
    seed: int,
    epochs: int,
    chosen: Tensor,
    queries: TensorDataset,
) -> tuple[Tensor, float]:
    """Measurements [subset, query] after training on each subset, and the processor time."""
    file = folder / f"outcomes{seed}.json"
    if not file.exists():
        module, trajectory, _ = recorded(folder, data, seed, epochs)
        task = DiffusionTask(timesteps=TIMESTEPS, draws=MEASURED_DRAWS)
        began = time.process_time()
        states = retrain_each(trajectory, module, None, data, chosen.double(), together=TOGETHER)
        outcomes = [measure(module, task, state, queries).tolist() for state in states]
        write(file, [outcomes, time.process_time() - began])
    outcomes, spent = json.loads(file.read_text())
    return torch.tensor(outcomes), spent


def write(file: Path, content: object) -> None:
    """As JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
