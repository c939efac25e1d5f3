"""Digits as quanda's tests want them, and the LeNet that is trained on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import Trajectory, TrajectoryRecorder
from tda_lightning.cli.trainers import SILENT
from tda_lightning.examples.data import FashionMNISTData, MNISTData
from tda_lightning.examples.models import Classifier

NUM_TRAIN, NUM_QUERY, SEED = 3000, 64, 0
EPOCHS, BATCH_SIZE, RATE, CHECKPOINTS = 10, 64, 0.05, 6
FLIPPED, MARKED, MIXED = 0.1, 0.5, 150  # share of labels, share of a class, pictures
BRIGHT = 4.0  # how much brighter the shortcut is than a white pixel: at 1 no query is misled
SHORTCUT_CLASS = MIXED_CLASS = 0
PROBLEMS = ("clean", "mislabelled", "subclass", "shortcut", "mixed")


@dataclass(frozen=True)
class Problem:
    """Data for one kind of test.

    Attributes:
        name: which.
        train: what the model is trained on.
        query: the queries with their labels.
        outputs: number of classes.
        train_groups: finer classes of the training examples (*subclass*).
        query_groups: of the queries.
        special: the training examples that the test is about: with a wrong label, with the
            shortcut, or from the other data set; bool [train].
    """

    name: str
    train: TensorDataset
    query: TensorDataset
    outputs: int = 10
    train_groups: Tensor = field(default_factory=lambda: torch.zeros(0))
    query_groups: Tensor = field(default_factory=lambda: torch.zeros(0))
    special: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


def problem(name: str, root: str) -> Problem:
    """The data of one test, 3000 digits and 64 queries."""
    flipped = FLIPPED if name == "mislabelled" else 0.0
    data = MNISTData(root, num_train=NUM_TRAIN, num_query=2000, flip_fraction=flipped)
    data.setup()
    train, query = (list(part.tensors) for part in (data.train_dataset, data.query_dataset))
    if name == "subclass":  # two digits are one class: 0 and 1, 2 and 3, ...
        groups = train[1], query[1][:NUM_QUERY]
        return Problem(
            name,
            TensorDataset(train[0], train[1] // 2),
            _first(query[0], query[1] // 2),
            5,
            *groups,
        )
    if name == "shortcut":
        return _shortcut(train, query)
    if name == "mixed":
        return _mixed(train, root)
    special = torch.zeros(NUM_TRAIN, dtype=torch.bool)
    special[data.flipped] = True
    return Problem(name, TensorDataset(*train), _first(*query), special=special)


def _first(inputs: Tensor, labels: Tensor) -> TensorDataset:
    return TensorDataset(inputs[:NUM_QUERY], labels[:NUM_QUERY])


def _shortcut(train: list[Tensor], query: list[Tensor]) -> Problem:
    """A bright square on half of the zeros; the queries are other digits with the square."""
    own = torch.Generator().manual_seed(SEED)
    zeros = (train[1] == SHORTCUT_CLASS).nonzero().squeeze(1)
    chosen = zeros[torch.randperm(len(zeros), generator=own)[: round(MARKED * len(zeros))]]
    special = torch.zeros(NUM_TRAIN, dtype=torch.bool)
    special[chosen] = True
    inputs = train[0].clone()
    top = BRIGHT * float(train[0].max())
    inputs[chosen] = marked(inputs[chosen], top)
    others = query[1] != SHORTCUT_CLASS
    asked = _first(marked(query[0][others], top), query[1][others])
    return Problem("shortcut", TensorDataset(inputs, train[1]), asked, special=special)


def marked(pictures: Tensor, value: float) -> Tensor:
    """With a square of 4 x 4 pixels of one value in a corner."""
    found = pictures.clone()
    found[:, :, 1:5, 1:5] = value
    return found


def _mixed(train: list[Tensor], root: str) -> Problem:
    """Pictures of one kind of clothes among the digits, all labelled 0; the queries are further
    such pictures."""
    clothes = FashionMNISTData(root, num_train=4000, num_query=None)
    clothes.setup()
    inputs, kinds = clothes.train_dataset.tensors
    coats = inputs[kinds == 8]  # bags
    foreign, asked = coats[:MIXED], coats[MIXED : MIXED + NUM_QUERY]
    own = torch.Generator().manual_seed(SEED)
    places = torch.randperm(NUM_TRAIN, generator=own)[:MIXED]
    mixed, labels = train[0].clone(), train[1].clone()
    mixed[places], labels[places] = foreign, MIXED_CLASS
    special = torch.zeros(NUM_TRAIN, dtype=torch.bool)
    special[places] = True
    query = TensorDataset(asked, torch.full((len(asked),), MIXED_CLASS))
    return Problem("mixed", TensorDataset(mixed, labels), query, special=special)


def network(outputs: int) -> Classifier:
    """LeNet-5 with rectified units, 61706 weights for ten classes."""
    layers = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, outputs),
    )
    return Classifier(layers, partial(torch.optim.SGD, lr=RATE))


def trained(train: TensorDataset, outputs: int, seed: int, folder: Path | None) -> Classifier:
    """A fresh network trained on ``train``, and recorded where a folder is given."""
    seed_everything(seed, verbose=False)
    module = network(outputs)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, generator=order)
    recorder = []
    if folder is not None:
        recorder = [TrajectoryRecorder(str(folder), num_checkpoints=CHECKPOINTS, overwrite=True)]
    Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=recorder, **SILENT).fit(module, loader)
    return module.eval()


def recorded(problem: Problem, folder: Path) -> tuple[Trajectory, Classifier]:
    """The run of a problem, trained if it is not there, and the model with its last weights."""
    done = folder / "recorded"
    if not done.exists():
        trained(problem.train, problem.outputs, SEED, folder / "run")
        done.touch()
    run = Trajectory.load(str(folder / "run"))
    module = network(problem.outputs).eval()
    module.load_state_dict(dict(run.checkpoints[run.last_step].parameters))
    return run, module
