"""Linear datamodeling scores on the losses of generated samples.

A smaller run (two fifths of it MNIST zeros) is trained again on random halves, by the recorded
batches and draws with weight 0 on what is left out. The scores are asked to predict the losses of
samples that the model has generated.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from experiments.diffusion.outliers import final
from experiments.diffusion.setting import RESULTS, SIZE, denoiser, samples, trained
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import InfluenceFunction, Retrac, Source, TracIn, Unrolled
from tda_lightning.estimators.base import Estimator
from tda_lightning.evaluation import (
    draw_subsets,
    interval_over_subsets,
    measure,
    retrain_each,
)
from tda_lightning.examples.data import OutlierImages
from tda_lightning.tasks import DiffusionTask

PLANES, ZEROS, QUERIES, DRAWS = 48, 32, 6, 4
TIMESTEPS = (100, 400, 700)
ESTIMATORS: dict[str, Estimator] = {
    "TracIn": TracIn(),
    "ReTrac": Retrac(),
    "influence (EK-FAC)": InfluenceFunction(),
    "SOURCE": Source(num_segments=2, leading_directions=0),
    "SOURCE, recorded order": Source(num_segments=2, leading_directions=0, order="recorded"),
    "exact unrolling": Unrolled(),
}


def run(root: str, folder: Path, epochs: int = 12, subsets: int = 24) -> None:
    """Train, score, train again on subsets, and keep what was measured."""
    torch.set_num_threads(1)
    data = OutlierImages(
        root=root, size=SIZE, num_train=PLANES, num_outliers=ZEROS, num_query=2, batch_size=16
    )
    module, seconds = denoiser(widths=(8, 16)), {}
    began = time.process_time()
    if not (folder / "trajectory.h5").exists():
        trained(folder, module, data, epochs, checkpoints=6)
    seconds["training"] = time.process_time() - began
    module = final(module, folder)
    queries, train = TensorDataset(samples(module, QUERIES)), data.train_dataset
    task = DiffusionTask(timesteps=TIMESTEPS, draws=DRAWS)
    trajectory = Trajectory.load(str(folder))
    chosen = draw_subsets(PLANES + ZEROS, 0.5, subsets, seed=0)
    began = time.process_time()
    outcomes = []
    for state in retrain_each(trajectory, module, None, train, chosen.double()):
        outcomes.append(measure(module, task, state, queries, trajectory=trajectory))
    outcomes = torch.stack(outcomes)
    seconds["retraining"] = time.process_time() - began
    print("retrained", f"{seconds['retraining']:.0f} s", flush=True)
    found: dict[str, list[float]] = {}
    for name, estimator in ESTIMATORS.items():
        began = time.process_time()
        attribution = AttributionModule(module, str(folder), estimator, task)
        scores = attribution.attribute(
            train, queries, batch_size=PLANES + ZEROS, self_influence=False
        )
        seconds[name] = time.process_time() - began
        score = interval_over_subsets(scores, chosen, outcomes)
        found[name] = [score.value, score.low, score.high]
        print(name, found[name], f"{seconds[name]:.0f} s", flush=True)
        setup = {"epochs": epochs, "planes": PLANES, "zeros": ZEROS, "queries": QUERIES}
        setup |= {"subsets": subsets, "draws": DRAWS, "size": SIZE, "steps": trajectory.last_step}
        kept = {"setup": setup, "seconds": seconds, "lds": found}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "retrainings.json").write_text(json.dumps(kept, indent=1))
