"""LDS of SOURCE through pre-training and fine-tuning, on digits.

python experiments/lds/two_stage.py

A tanh network learns the ten digits (stage 1: 600 examples), then odd against even with a new head
on 150 others (stage 2), its trunk trained on or frozen. The queries belong to stage 2. Examples are
left out of stage 1, or of both stages, both stages are replayed with the same batches, and the
query's loss is compared with the sums of scores. ``exact`` is the derivative of that replay, by
weights less 1e-4 of what is left out. Two wrong ways show what the pieces are worth: ``stage 2
without effect`` gives stage-1 examples the final model's gradients as if stage 2 had taken no time
(frozen parameters: as if their block were left alone), and ``one common N`` divides every stage's
scores by N1 + N2.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import Source
from tda_lightning.evaluation import (
    difference,
    draw_subsets,
    linear_datamodeling_score,
    measure,
    retrain,
    retrain_each,
)
from tda_lightning.examples.data import DigitsData
from tda_lightning.tasks import ClassificationTask

SIZES = (600, 150)
QUERIES, SUBSETS, KEPT = 100, 60, 0.95
_SHARE = 1e-4


class Net(LightningModule):
    """Two tanh layers and a head, in float64."""

    def __init__(self, classes: int, rate: float) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh()
        )
        self.head = nn.Linear(12, classes)
        self.rate = rate
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.trunk(inputs))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, self.rate, momentum=0.9)


def digits() -> tuple[list[TensorDataset], TensorDataset]:
    """Training sets of both stages and the queries."""
    data = DigitsData(num_train=sum(SIZES), num_query=QUERIES)
    data.setup()
    images, labels = (tensor for tensor in data.train_dataset.tensors)
    first, second = slice(0, SIZES[0]), slice(SIZES[0], None)
    asked, answers = data.query_dataset.tensors
    return [
        TensorDataset(images[first].double(), labels[first]),
        TensorDataset(images[second].double(), labels[second] % 2),
    ], TensorDataset(asked.double(), answers % 2)


def train(
    module: Net, data: TensorDataset, folder: Path, epochs: int, batch_size: int
) -> Trajectory:
    loader = DataLoader(data, batch_size, shuffle=True)
    Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[TrajectoryRecorder(str(folder), num_checkpoints=6)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader)
    return Trajectory.load(str(folder))


def outcomes(
    modules: list[Net],
    runs: list[Trajectory],
    data: list[TensorDataset],
    queries: TensorDataset,
    weights: Tensor,
) -> Tensor:
    """Each query's loss after both stages with these weights, [subset, query]."""
    task, found = ClassificationTask(), []
    ends = retrain_each(runs[0], modules[0], task, data[0], weights[:, : SIZES[0]], together=20)
    for end, own in zip(ends, weights[:, SIZES[0] :], strict=True):
        begin = runs[1].checkpoints[0]
        own_head = {name: t for name, t in begin.parameters.items() if name.startswith("head")}
        start = replace(
            begin,
            parameters={n: own_head.get(n, end.get(n)) for n in begin.parameters},
            buffers={n: end[n] for n in begin.buffers},
        )
        run = replace(runs[1], checkpoints={**runs[1].checkpoints, 0: start})
        state = retrain(run, modules[1], task, data[1], own)
        found.append(measure(modules[1], task, state, queries))
    return torch.stack(found)


def without_effect(run: Trajectory) -> Trajectory:
    """The run as if it had taken no time."""
    steps = replace(run.steps, learning_rate=run.steps.learning_rate * 1e-12)
    return replace(run, steps=steps, curvature={})


def study(frozen: bool) -> None:
    """One table: rows are scores, columns what is left out."""
    seed_everything(0, verbose=False)
    data, queries = digits()
    with tempfile.TemporaryDirectory() as folder:
        modules = [Net(10, 0.05)]
        runs = [train(modules[0], data[0], Path(folder, "pre"), epochs=15, batch_size=60)]
        modules.append(Net(2, 0.02))
        modules[1].trunk.load_state_dict(modules[0].trunk.state_dict())
        modules[1].trunk.requires_grad_(not frozen)
        runs.append(train(modules[1], data[1], Path(folder, "fine"), epochs=15, batch_size=30))
        scores = score(modules, runs, data, queries)
        everything = torch.ones(1, sum(SIZES), dtype=torch.float64)
        first = draw_subsets(SIZES[0], KEPT, SUBSETS)
        second = torch.ones(SUBSETS, SIZES[1], dtype=torch.bool)
        for title, subsets in (
            ("stage 1", torch.cat([first, second], 1)),
            ("both stages", draw_subsets(sum(SIZES), KEPT, SUBSETS, seed=1)),
        ):
            small = 1 - _SHARE * (~subsets).double()
            weights = torch.cat([everything, subsets.double(), small])
            found = outcomes(modules, runs, data, queries, weights)
            full, kept, nearly = found[0], found[1 : SUBSETS + 1], found[SUBSETS + 1 :]
            exact = (nearly - full) / _SHARE
            print(f"\ntrunk {'frozen' if frozen else 'trained on'}, left out of {title}")
            show(scores, subsets, kept, exact)


def score(
    modules: list[Net], runs: list[Trajectory], data: list[TensorDataset], queries: TensorDataset
) -> dict[str, Tensor]:
    """Scores [query, both training sets] by name."""

    def of(estimator: Source, used: list[Trajectory]) -> Tensor:
        attribution = AttributionModule(modules, used, estimator, ClassificationTask())
        quiet = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        return attribution.attribute(data, queries, trainer=quiet).values

    recorded = of(Source(order="recorded"), runs)
    skipped = of(Source(order="recorded"), [runs[0], without_effect(runs[1])])
    first, total = SIZES[0], sum(SIZES)
    own = torch.cat([torch.full((size,), size / total) for size in SIZES])
    return {
        "recorded order": recorded,
        "SOURCE": of(Source(), runs),
        "SOURCE, blocks": of(Source(leading_directions=0), runs),
        "stage 2 without effect": torch.cat([skipped[:, :first], recorded[:, first:]], 1),
        "one common N": recorded * own,
    }


def show(scores: dict[str, Tensor], subsets: Tensor, kept: Tensor, exact: Tensor) -> None:
    """LDS, LDS less that of the first row, and agreement with the exact change."""
    alone = torch.eye(len(subsets)).bool()
    ceiling = linear_datamodeling_score(-exact.T, alone, kept)
    print(f"| {'scores':<22} | LDS | less recorded order | rank with exact | slope |")
    print("|---|---|---|---|---|")
    print(f"| {'exact':<22} | {ceiling} | | 1 | 1 |")
    best = linear_datamodeling_score(scores["recorded order"], subsets, kept)
    for name, values in scores.items():
        found = linear_datamodeling_score(values, subsets, kept)
        predicted = (~subsets).double() @ values.double().T
        alike = linear_datamodeling_score(-predicted.T, alone, exact)
        slope = float((predicted * exact).sum() / predicted.square().sum())
        less = "" if name == "recorded order" else difference(found, best)
        print(f"| {name:<22} | {found} | {less} | {alike.value:.3f} | {slope:.2f} |")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    for choice in (False, True) if len(sys.argv) == 1 else (sys.argv[1] == "frozen",):
        study(choice)
