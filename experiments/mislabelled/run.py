"""The whole study: train, rank, mend, retrain; keep the results; write the tables and figures.

python -m experiments.mislabelled.run --data-root FOLDER

FOLDER holds ``fashion_mnist/``. Interrupted, the same command goes on: the recorded runs and what
has been found are kept in ``runs/mislabelled``, which belongs to one setting: after a change, give
another ``--folder``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.mislabelled import edits, mending, proponents, ranking, setting, table
from tda_lightning import Trajectory
from tda_lightning.evaluation import detection_auc, found_within
from tda_lightning.examples.data import FashionMNISTData
from tda_lightning.recording.facts import package_versions
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.store.atomic_write import write_text


class Notes:
    """A JSON file of what has been found so far, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, find: Callable[[], Any]) -> Any:
        """What is noted under ``name``; found and noted if it is not there."""
        if name not in self.found:
            self.found[name] = find()
            write_text(self.path, json.dumps(self.found))
        return self.found[name]


def main() -> None:
    """All seeds; the edits and proponents of the first one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of fashion_mnist/")
    parser.add_argument("--folder", type=Path, default=Path("runs/mislabelled"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seeds = []
    for seed in setting.SEEDS:
        folder = options.folder / f"seed-{seed}"
        data = setting.load(options.data_root, seed)
        run = setting.recorded(folder, data, seed)
        notes = Notes(folder / "notes.json")
        rankings = {name: ranked(name, run, data, seed, notes) for name in ranking.TITLES}
        one: dict[str, Any] = {
            "recorded": notes.get("recorded", partial(accuracies, run, data)),
            "finding": {name: finding(item, data) for name, item in rankings.items()},
            "seconds": {name: round(notes.found[f"{name} seconds"], 1) for name in rankings},
            "mending": mended(rankings, data, seed, notes),
        }
        if seed == setting.SEEDS[0]:
            one["edits"] = edited(folder, data, rankings["source"], seed, notes)
            one["proponents"] = behind(run, data)
        seeds.append(one)
    results = {"seeds": seeds, "versions": package_versions()}
    write_text(table.HERE / "results" / "results.json", json.dumps(results, indent=1) + "\n")
    table.publish()


def ranked(name: str, run: Trajectory, data: FashionMNISTData, seed: int, notes: Notes) -> Tensor:
    """One ranking, and the seconds of the thread's own time that it took."""

    def find() -> list[float]:
        began = time.process_time()
        found = ranking.suspicion(name, run, data, seed)
        notes.found[f"{name} seconds"] = time.process_time() - began
        return found.tolist()

    return torch.tensor(notes.get(name, find))


def accuracies(run: Trajectory, data: FashionMNISTData) -> dict[str, float]:
    """Of the recorded run's last model."""
    module = setting.final(run)
    labels = data.train_dataset.tensors[1]
    with torch.no_grad():
        classes = module(data.train_dataset.tensors[0]).argmax(1)
    return {
        "test": setting.accuracy(module, data.query_dataset),
        "training labels": float((classes == labels).float().mean()),
        "flipped labels learned": float((classes == labels)[data.flipped].float().mean()),
    }


def finding(suspicion: Tensor, data: FashionMNISTData) -> dict[str, float]:
    """How well the flipped labels are found."""
    wrong = torch.zeros(len(suspicion), dtype=torch.bool)
    wrong[data.flipped] = True
    within = {
        f"within {share:g}": found_within(suspicion, wrong, share) for share in mending.LOOKED
    }
    return {"auc": detection_auc(suspicion, wrong), **within}


def mended(
    rankings: dict[str, Tensor], data: FashionMNISTData, seed: int, notes: Notes
) -> dict[str, float]:
    """Test accuracy after every retraining."""
    work = dict(mending.worklist(rankings, data))
    found = {}
    with SlowProgress(f"Retraining, seed {seed}", len(work)) as progress:
        for name, changed in work.items():
            found[name] = notes.get(name, partial(mending.tested, changed, data, seed))
            progress.advance()
    return found


def edited(
    folder: Path, data: FashionMNISTData, suspicion: Tensor, seed: int, notes: Notes
) -> dict[str, Any]:
    """Predicted and measured changes of the mean test loss, label by label.

    The labels, and what they are changed to, are those of the study's own run; the same are changed
    in the run of a network that differs in its activation alone.
    """
    changes = edits.proposed(setting.recorded(folder, data, seed), data, suspicion)
    found: dict[str, Any] = {
        "was flipped": torch.isin(changes.examples, data.flipped).tolist(),
        "proposal is right": (changes.labels == data.clean_labels[changes.examples]).tolist(),
    }
    for name in edits.ACTIVATIONS:
        own = folder if name == "relu" else folder / name
        work = (setting.recorded(own, data, seed, name), data, changes, name)
        predicted = notes.get(f"predicted {name}", lambda w=work: edits.predicted(*w).tolist())
        measured = notes.get(f"measured {name}", partial(all_of, edits.measured(*work)))
        nudged = notes.get(f"nudged {name}", partial(edits.nudged, work[0], data, name))
        found[name] = {
            "predicted": predicted,
            "measured": [loss - measured[0] for loss in measured[1:]],
            "nudged": nudged - measured[0],
            "test loss": measured[0],
        }
    return found


def all_of(losses: Iterator[float]) -> list[float]:
    """With a bar."""
    found = []
    with SlowProgress("Retraining with one label changed", edits.EDITED + 1) as progress:
        for loss in losses:
            found.append(loss)
            progress.advance()
    return found


def behind(run: Trajectory, data: FashionMNISTData) -> dict[str, Any]:
    """Of the top proponents of wrong predictions: how many labels are flipped, query by query."""
    examples, classes = proponents.wrong_predictions(run, data)
    found = proponents.proponents(run, data, examples, classes)
    drawing = proponents.drawing(data, examples, classes, found)
    write_text(table.HERE / "results" / "proponents.svg", drawing)
    labels = data.train_dataset.tensors[1]
    return {
        name: {
            "flipped": torch.isin(top, data.flipped).float().mean(1).tolist(),
            "labelled as predicted": (labels[top] == classes[:, None]).float().mean(1).tolist(),
        }
        for name, top in found.items()
    }


if __name__ == "__main__":
    main()
