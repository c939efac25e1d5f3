"""The recorded runs of this study, opened: model, pairs, and which of them are asked about."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tda_lightning import Trajectory
from tda_lightning.cli.run_config import build, load_config
from tda_lightning.tasks import AttributionTask

RUNS = Path("runs/fastif")
SEEDS = (0, 1)
NUM_MNLI, NUM_HANS = 100, 300  # queries
NUM_TEST, NUM_EACH = 300, 300  # pairs on which accuracy is measured; of HANS for each label
# All other pairs of MNLI are trained on, but 15; 261 that contradict the heuristics of HANS follow.
NUM_TRAIN = 9400
SETTINGS = (f"data.holdout={9815 - NUM_TRAIN}", "data.contradicting=true")


@dataclass
class Run:
    """One recorded run.

    Attributes:
        folder: of the trajectory.
        module: holds the last recorded weights.
        train: the training pairs, column n of the scores.
        queries: held-out pairs of MNLI, and then pairs of HANS, (inputs, class).
        mnli: which queries are of MNLI.
        test: pairs that are asked about nowhere, by set.
    """

    folder: Path
    trajectory: Trajectory
    module: LightningModule
    task: AttributionTask
    train: Dataset
    queries: TensorDataset
    mnli: slice
    hans: slice
    test: dict[str, tuple[Tensor, Tensor]]

    @cached_property
    def last(self) -> dict[str, Tensor]:
        """The last recorded weights."""
        last = self.trajectory.checkpoints[self.trajectory.last_step]
        return {**last.buffers, **last.parameters}

    def restore(self) -> None:
        """Put the last recorded weights back."""
        self.module.load_state_dict(self.last)


def record(seed: int, data_root: str | None) -> Path:
    """The folder of a run, recorded where it is not there yet."""
    folder = RUNS / f"seed{seed}"
    if not folder.exists():
        aside = RUNS / f"seed{seed}.part"  # an interrupted run is not taken for a whole one
        root = [] if data_root is None else [f"data.root={data_root}"]
        arguments = ["train", "experiment=mnli_encoder", *root, *SETTINGS, f"seed={seed}"]
        arguments += [f"data.split_seed={seed}", "threads=1", f"output={aside}", "overwrite=true"]
        subprocess.run([sys.executable, "-m", "tda_lightning.cli", *arguments], check=True)
        aside.rename(folder)
    return folder


def open_run(folder: Path, seed: int) -> Run:
    """Everything that the parts of the study need of a recorded run."""
    config, trajectory = load_config(folder), Trajectory.load(str(folder))
    data = build(config.data, trust=False, num_query=None)
    hans = build(config.data, trust=False, num_query=None, queries="hans")
    own = torch.Generator().manual_seed(seed)

    def drawn(places: list[int], count: int) -> list[list[int]]:
        order = torch.randperm(len(places), generator=own).tolist()
        return [[places[n] for n in part] for part in (order[:count], order[count:])]

    held_out = data.query_dataset.tensors
    asked, left = drawn(list(range(len(held_out[1]))), NUM_MNLI)
    left = left[:NUM_TEST]
    patterns = hans.query_dataset.tensors
    places: dict[str, list[int]] = {"train": [], "entailed": [], "not": []}
    for place, (pair, target) in enumerate(zip(hans.pairs["query"], patterns[1], strict=True)):
        label = "not" if target else "entailed"
        places["train" if pair.origin == "train" else label].append(place)
    anchors, _ = drawn(places["train"], NUM_HANS)
    # Half of each label, one half after the other: the same answer to all is right for half.
    tests = [n for label in ("entailed", "not") for n in drawn(places[label], NUM_EACH)[0]]
    queries = TensorDataset(
        *(torch.cat([a[asked], b[anchors]]) for a, b in zip(held_out, patterns, strict=True))
    )
    run = Run(
        folder=folder,
        trajectory=trajectory,
        module=build(config.model, trust=False, optimizer=None, scheduler=None).eval(),
        task=build(config.task, trust=False),
        train=data.train_dataset,
        queries=queries,
        mnli=slice(0, NUM_MNLI),
        hans=slice(NUM_MNLI, NUM_MNLI + NUM_HANS),
        test={
            "mnli": (held_out[0][left], held_out[1][left]),
            "hans": (patterns[0][tests], patterns[1][tests]),
        },
    )
    run.restore()
    return run
