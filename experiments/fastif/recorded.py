"""The recorded runs of this study, opened: model, pairs, and which of them are asked about."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tda_lightning import Trajectory
from tda_lightning.cli.recorded import build, load_config
from tda_lightning.tasks import AttributionTask

RUNS = Path("runs/fastif")
SEEDS = (0, 1)
# Pairs of MNLI to train on; the 261 that contradict the heuristics of HANS follow them.
NUM_TRAIN = 3739
SETTINGS = (f"data.num_train={NUM_TRAIN}", "data.contradicting=true")
NUM_MNLI, NUM_HANS = 100, 100  # queries
NUM_TEST = 300  # pairs of each set on which accuracy is measured


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

    def restore(self) -> None:
        """Put the last recorded weights back."""
        last = self.trajectory.checkpoints[self.trajectory.last_step]
        self.module.load_state_dict({**last.buffers, **last.parameters})


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
    patterns = hans.query_dataset.tensors
    by_origin: dict[str, list[int]] = {"train": [], "eval": []}
    for place, pair in enumerate(hans.pairs["query"]):
        by_origin[pair.origin].append(place)
    anchors, _ = drawn(by_origin["train"], NUM_HANS)
    tests, _ = drawn(by_origin["eval"], NUM_TEST)
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
            "mnli": (held_out[0][left[:NUM_TEST]], held_out[1][left[:NUM_TEST]]),
            "hans": (patterns[0][tests], patterns[1][tests]),
        },
    )
    run.restore()
    return run
