"""What an ensemble's scores say beside their mean: runs of several seeds, scored and judged.

python -m experiments.distributional.run --data-root FOLDER       # goes on where it stopped
python -m experiments.distributional.table --write
"""

from __future__ import annotations

import argparse
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments.distributional.measures import MEASURES
from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.cli.command import quiet_lightning
from tda_lightning.cli.trainers import SILENT, silent_trainer
from tda_lightning.estimators import TracIn
from tda_lightning.evaluation import detection_auc
from tda_lightning.examples.data import MNISTData
from tda_lightning.examples.models import MLP, Classifier
from tda_lightning.store.atomic_write import write_text
from tda_lightning.tasks import ClassificationTask

RESULTS = Path(__file__).parent / "results"
DRAWS, MEMBERS = 3, 10  # training sets with their wrong labels, and runs on each
NUM_TRAIN, NUM_QUERY, FLIPPED = 1000, 64, 0.1
EPOCHS, BATCH_SIZE, RATE, TOP = 10, 32, 0.05, 10


def main() -> None:
    """All training sets that are not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True, help="folder of the data sets")
    parser.add_argument("--folder", type=Path, default=Path("runs/distributional"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    warnings.filterwarnings("ignore")
    RESULTS.mkdir(exist_ok=True)
    for draw in range(DRAWS):
        path = RESULTS / f"draw-{draw}.json"
        if not path.exists():
            found = judged(*members(draw, options.data_root, options.folder))
            write_text(path, json.dumps(found, indent=1) + "\n")


def members(draw: int, root: str, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores [member, query, train], self-influence [member, train], the queries' losses
    [member, query], and which labels are wrong."""
    data = MNISTData(
        root,
        num_train=NUM_TRAIN,
        num_query=NUM_QUERY,
        subset_seed=draw,
        flip_fraction=FLIPPED,
        flip_seed=draw,
    )
    data.setup()
    wrong = torch.zeros(NUM_TRAIN, dtype=torch.bool)
    wrong[data.flipped] = True
    rows = [scored(data.train_dataset, data.query_dataset, s, folder) for s in range(MEMBERS)]
    values, own, losses = (torch.stack(part) for part in zip(*rows, strict=True))
    return values, own, losses, wrong


def scored(
    train: Any, query: TensorDataset, seed: int, folder: Path
) -> tuple[Tensor, Tensor, Tensor]:
    """One run, recorded and scored."""
    seed_everything(seed, verbose=False)
    module = Classifier(MLP(784, [64], 10), partial(torch.optim.SGD, lr=RATE))
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, generator=order)
    recorder = TrajectoryRecorder(str(folder), num_checkpoints=5, overwrite=True)
    Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[recorder], **SILENT).fit(
        module, loader
    )
    attribution = AttributionModule(module, str(folder), TracIn(), ClassificationTask())
    scores = attribution.attribute(train, query, trainer=silent_trainer(), self_influence=True)
    assert scores.self_influence is not None
    losses = torch.tensor(scores.provenance["measurements"])
    return scores.values.double(), scores.self_influence.double(), losses.double()


def judged(values: Tensor, own: Tensor, losses: Tensor, wrong: Tensor) -> dict[str, Any]:
    """What each measure of half of the runs finds, for both halves in turn."""
    half = MEMBERS // 2
    found: dict[str, Any] = {}
    for name, measure in MEASURES.items():
        aucs, positive, shared, kept = [], [], [], []
        for seen in (slice(0, half), slice(half, MEMBERS)):
            other = slice(half, MEMBERS) if seen.start == 0 else slice(0, half)
            # The measurement of a training example's own influence is not needed for its spread.
            aucs.append(detection_auc(measure(own[seen, None], None)[0], wrong))
            top = measure(values[seen], losses[seen]).topk(TOP, dim=1).indices
            unseen = values[other].gather(2, top.expand(half, -1, -1))
            positive.append((unseen > 0).double().mean((0, 2)))
            best = values[other].mean(0).topk(TOP, dim=1).indices
            shared.append((top[:, :, None] == best[:, None]).any(2).double().mean(1))
            most = values[other].mean(0).topk(TOP, dim=1).values.sum(1)
            kept.append(unseen.mean(0).sum(1) / most)
        found[name] = {
            "auc": aucs,
            **{
                key: torch.stack(parts).mean(0).tolist()
                for key, parts in (("positive", positive), ("shared", shared), ("kept", kept))
            },
        }
    one = [detection_auc(own[member], wrong) for member in range(MEMBERS)]
    found["one run"] = {"auc": one, **of_one_run(values)}
    return found


def of_one_run(values: Tensor) -> dict[str, list[float]]:
    """The strongest proponents of the first run of each half, judged by the other half."""
    half = MEMBERS // 2
    parts: dict[str, list[Tensor]] = {"positive": [], "shared": [], "kept": []}
    for first, other in ((0, slice(half, MEMBERS)), (half, slice(0, half))):
        top = values[first].topk(TOP, dim=1).indices
        unseen = values[other].gather(2, top.expand(half, -1, -1))
        best = values[other].mean(0).topk(TOP, dim=1)
        parts["positive"].append((unseen > 0).double().mean((0, 2)))
        parts["shared"].append((top[:, :, None] == best.indices[:, None]).any(2).double().mean(1))
        parts["kept"].append(unseen.mean(0).sum(1) / best.values.sum(1))
    return {key: torch.stack(part).mean(0).tolist() for key, part in parts.items()}


if __name__ == "__main__":
    main()
