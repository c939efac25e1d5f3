"""The recorded runs of this study: pairs trained on, the pool, the target, and other test pairs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from tda_lightning import Trajectory
from tda_lightning.cli.run_config import build, load_config
from tda_lightning.edits import additions, known_examples
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import AttributionTask

RUNS = Path("runs/select")
SEEDS = (0, 1, 2)  # of initial weights and of the order of the pairs
NUM_TRAIN, NUM_TARGET, NUM_EACH, NUM_MNLI = 4000, 300, 300, 600


@dataclass
class Run:
    """One recorded run.

    Attributes:
        train: MNLI pairs that it was trained on.
        pool: other MNLI pairs, and those that contradict the heuristics of HANS.
        contradicting: which pairs of the pool those are, bool [pool].
        labels: of the pool, int64 [pool].
        target: HANS-like pairs; anchors are drawn from them.
        test: pairs that are nowhere else, by set: (inputs, class). Of "hans" half are entailed.
    """

    trajectory: Trajectory
    module: LightningModule
    task: AttributionTask
    train: Dataset[Any]
    pool: Dataset[Any]
    contradicting: Tensor
    labels: Tensor
    target: TensorDataset
    test: dict[str, tuple[Tensor, Tensor]]


def record(seed: int, data_root: str | None) -> Path:
    """The folder of a run, recorded where it is not there yet."""
    folder = RUNS / f"seed{seed}"
    if not folder.exists():
        aside = RUNS / f"seed{seed}.part"  # an interrupted run is not taken for a whole one
        root = [] if data_root is None else [f"data.root={data_root}"]
        arguments = ["train", "experiment=mnli_encoder", *root, f"data.num_train={NUM_TRAIN}"]
        # Curvature gathered in training makes it cheap to score anew after every step.
        arguments += ["recorder.curvature=online"]
        arguments += [f"seed={seed}", "threads=1", f"output={aside}", "overwrite=true"]
        subprocess.run([sys.executable, "-m", "tda_lightning.cli", *arguments], check=True)
        aside.rename(folder)
    return folder


def open_run(folder: Path) -> Run:
    """Everything that the study needs of a recorded run; the same pairs for every seed."""
    config = load_config(folder)
    data = build(config.data, trust=False, num_query=None)
    whole = build(config.data, trust=False, num_train=None, contradicting=True)
    hans = build(config.data, trust=False, num_query=None, queries="hans")
    own = torch.Generator().manual_seed(0)
    known = known_examples(additions(whole.train_dataset), ExampleSource(data.train_dataset, 1))
    new = [n for n in range(len(whole.train_dataset)) if n not in known]
    inputs, classes = hans.query_dataset.tensors
    places: dict[str, list[int]] = {"train": [], "entailed": [], "not": []}
    for place, (pair, target) in enumerate(zip(hans.pairs["query"], classes, strict=True)):
        label = "not" if target else "entailed"
        places["train" if pair.origin == "train" else label].append(place)

    def drawn(kind: str, count: int) -> list[int]:
        order = torch.randperm(len(places[kind]), generator=own).tolist()
        return [places[kind][n] for n in order[:count]]

    anchors = drawn("train", NUM_TARGET)
    tests = [*drawn("entailed", NUM_EACH), *drawn("not", NUM_EACH)]
    held_out = data.query_dataset.tensors
    left = torch.randperm(len(held_out[1]), generator=own)[:NUM_MNLI]
    origins = whole.group_columns("train")["origin"]
    return Run(
        trajectory=Trajectory.load(str(folder)),
        module=build(config.model, trust=False, optimizer=None, scheduler=None).eval(),
        task=build(config.task, trust=False),
        train=data.train_dataset,
        pool=Subset(whole.train_dataset, new),
        contradicting=torch.tensor([origins[n] != "MNLI" for n in new]),
        labels=whole.train_dataset.tensors[1][new],
        target=TensorDataset(inputs[anchors], classes[anchors]),
        test={
            "hans": (inputs[tests], classes[tests]),
            "mnli": (held_out[0][left], held_out[1][left]),
        },
    )
