"""Brittleness: does a prediction flip when its strongest proponents are left out?

python -m experiments.judges.brittleness --data-root FOLDER

The metric of dattri's benchmarks (Ilyas et al., 2022, https://arxiv.org/abs/2202.00622): for each
query the run is trained again without its first k proponents, from the same initial weights in the
same order, and its predicted class is compared. Retraining for every query and k is what it costs,
so the problem is small: 1000 digits, a perceptron with 32 hidden units, the queries the first 24
that the model gets right. Beside it random examples are left out, as many and eight times, and
those of the query's own class that are nearest to it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.judges.names import BRITTLE_QUERIES
from experiments.judges.run import RESULTS, Notes
from tda_lightning import AttributionModule, Scores, Trajectory, TrajectoryRecorder
from tda_lightning.cli.command import quiet_lightning
from tda_lightning.cli.trainers import SILENT, silent_trainer
from tda_lightning.estimators import TRAK, InfluenceFunction, Source, TracIn
from tda_lightning.evaluation import top_removal
from tda_lightning.examples.data import MNISTData
from tda_lightning.examples.models import Classifier
from tda_lightning.tasks import ClassificationTask

NUM_TRAIN, NUM_QUERY = 1000, BRITTLE_QUERIES
EPOCHS, BATCH_SIZE, RATE, SEED = 8, 50, 0.1, 0
REMOVED, DRAWS, TOGETHER = (20, 50, 100), 8, 25
ROWS: dict[str, tuple[Callable[[], Any], float]] = {
    "TracIn": (TracIn, 1.0),
    "TRAK": (TRAK, 1.0),
    "EK-FAC": (InfluenceFunction, 1.0),
    "SOURCE": (Source, 1.0),
    "SOURCE at .5": (Source, 0.5),
}
NEAREST = "nearest of the class"


def network() -> Classifier:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    return Classifier(layers, partial(torch.optim.SGD, lr=RATE))


def recorded(train: TensorDataset, folder: Path) -> Trajectory:
    seed_everything(SEED, verbose=False)
    recorder = TrajectoryRecorder(str(folder), num_checkpoints=6, overwrite=True)
    order = torch.Generator().manual_seed(SEED)
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, generator=order)
    Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[recorder], **SILENT).fit(
        network(), loader
    )
    return Trajectory.load(str(folder))


def nearest(train: TensorDataset, query: TensorDataset) -> Tensor:
    """Minus the distance of pixels, of examples with the query's label; the others follow."""
    pictures = [own.tensors[0].flatten(1) for own in (query, train)]
    labels = [own.tensors[1] for own in (query, train)]
    far = torch.cdist(*pictures)
    return -(far + far.max() * (labels[0][:, None] != labels[1]))


def right(run: Trajectory, inputs: Tensor, labels: Tensor) -> TensorDataset:
    """The first queries that the model gets right."""
    module = network().eval()
    module.load_state_dict(dict(run.checkpoints[run.last_step].parameters))
    with torch.no_grad():
        places = (module.network(inputs).argmax(1) == labels).nonzero()[:NUM_QUERY, 0]
    return TensorDataset(inputs[places], labels[places])


def main() -> None:
    """Train, score, retrain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True, help="folder of the data sets")
    parser.add_argument("--folder", type=Path, default=Path("runs/judges/brittleness"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    warnings.filterwarnings("ignore")
    data = MNISTData(options.data_root, num_train=NUM_TRAIN, num_query=200)
    data.setup()
    train, task = data.train_dataset, ClassificationTask()
    run = recorded(train, options.folder / "run")
    query = right(run, *data.query_dataset.tensors)
    notes = Notes(RESULTS / "brittleness.json")

    def flips(scores: Scores) -> dict[str, Any]:
        began = time.process_time()
        found = top_removal(
            run, network(), task, train, query, scores, REMOVED, DRAWS, together=TOGETHER
        )
        seconds = round(time.process_time() - began, 1)
        shares = [[own.flipped, own.random_flipped] for own in found]
        return {"removed": REMOVED, "flipped": shares, "seconds": seconds}

    for name, (make, keep) in ROWS.items():
        if name not in notes.found:
            scores = AttributionModule(network(), run, make(), task).attribute(
                train, query, trainer=silent_trainer(), self_influence=False, keep=keep
            )
            notes.once(name, lambda own=scores: flips(own))
    notes.once(NEAREST, lambda: flips(Scores(nearest(train, query))))


if __name__ == "__main__":
    main()
