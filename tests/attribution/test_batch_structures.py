"""Batches of any structure: the gradient of each example is that of the batch of one that the
loader's own collate function makes of it."""

from __future__ import annotations

import types
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    unpack_sequence,
)
from torch.utils.data import DataLoader, Dataset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.edits import Relabel
from tda_lightning.estimators import Source, TracIn, Unrolled
from tda_lightning.evaluation import landing_error, measure, retrain
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import AttributionTask
from tda_lightning.tasks.training_step import TrainingStepTask
from tests.attributing import quiet
from tests.standing import by_hand, standing_run, tracin

SIZE, TALL = 9, 5
Item = tuple[Tensor, Tensor]


class Sequences(Dataset):
    """Sequences of 1 to 5 vectors, and a label; the longest are in the middle."""

    def __init__(self, same_length: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        lengths = [2 if n < 3 else 1 + n % TALL for n in range(SIZE)]
        self.x = [
            torch.randn(TALL if same_length else length, 3, dtype=torch.float64, generator=draw)
            for length in lengths
        ]
        self.y = torch.arange(SIZE) % 2

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Item:
        return self.x[index], self.y[index]


class Net(LightningModule):
    """A layer and a bare parameter for each vector, summed over the sequence. ``read`` makes padded
    sequences [example, place, 3], their mask and the labels of a batch."""

    def __init__(self, read: Callable[[Any], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.bare = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.read = read

    def losses(self, batch: Any) -> Tensor:
        x, mask, y = self.read(batch)
        hidden = ((self.layer(x) + (x @ self.bare).tanh()) * mask[..., None]).sum(1)
        return F.cross_entropy(self.head(hidden), y, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def padded(items: list[Item], **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = pad_sequence([x for x, _ in items], batch_first=True, **how)
    lengths = torch.tensor([len(x) for x, _ in items])
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    if how.get("padding_side") == "left":
        mask = mask.flip(1)
    return x, mask.double(), torch.stack([y for _, y in items])


class Batch(UserDict):
    """As transformers.BatchEncoding is."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]

    def to(self, device: Any) -> Batch:
        return self


@dataclass
class Record:
    x: Tensor
    mask: Tensor
    y: Tensor
    origin: str = "here"


@dataclass(frozen=True)
class Frozen:
    inner: Record
    names: list[str]

    def to(self, device: Any) -> Frozen:
        return self  # Lightning opens no frozen dataclass


class Thing:
    """Anything with a method to move it."""

    def __init__(self, x: Tensor, mask: Tensor, y: Tensor) -> None:
        self.x, self.mask, self.y = x, mask, y

    def to(self, device: Any) -> Thing:
        return Thing(self.x.to(device), self.mask.to(device), self.y.to(device))


class Closed:
    """One that shows none of its parts."""

    __slots__ = ("__weakref__", "parts")

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts

    def to(self, device: Any) -> Closed:
        return self


Named = namedtuple("Named", "x mask y")


def graph(items: list[Item]) -> dict[str, Tensor]:
    """One graph of all examples: its nodes, whose each is, and the edges of each chain."""
    owner = torch.cat([torch.full((len(x),), n) for n, (x, _) in enumerate(items)])
    edges, first = [], 0
    for x, _ in items:
        edges.append(torch.arange(first, first + len(x) - 1))
        first += len(x)
    nodes = torch.cat([x for x, _ in items])
    return {
        "nodes": nodes,
        "edges": torch.cat(edges),
        "owner": owner,
        "y": torch.stack([y for _, y in items]),
    }


def of_graph(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    nodes, edges = batch["nodes"], batch["edges"]
    passed = nodes.index_add(0, edges + 1, nodes[edges])  # from each node to the next one
    own = [passed[batch["owner"] == n] for n in range(len(batch["y"]))]
    x, mask, _ = padded([(part, torch.tensor(0)) for part in own])
    return x, mask, batch["y"]


def of_offsets(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = batch["offsets"].diff().tolist()
    x, mask, _ = padded([(part, torch.tensor(0)) for part in batch["flat"].split(lengths)])
    return x, mask, batch["y"]


def offsets(items: list[Item]) -> dict[str, Tensor]:
    ends = torch.tensor([0, *(len(x) for x, _ in items)]).cumsum(0)
    flat = torch.cat([x for x, _ in items])
    return {"flat": flat, "offsets": ends, "y": torch.stack([y for _, y in items])}


def of_packed(batch: tuple[PackedSequence, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x, lengths = pad_packed_sequence(batch[0], batch_first=True)
    return x, (torch.arange(x.shape[1]) < lengths[:, None]).double(), batch[1]


def of_list(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    return padded(list(zip(batch["parts"], batch["y"], strict=True)))


TABLE = torch.linspace(0.5, 2, TALL, dtype=torch.float64)
NEAR = torch.eye(TALL, dtype=torch.float64) + 0.5


def with_places(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    x = (batch["near"] @ batch["x"]) * TABLE[batch["places"]][:, None] * batch["factors"][:, None]
    return x, batch["mask"], batch["y"]


def places(items: list[Item]) -> dict[str, Any]:
    """With tensors of the model's, all as long as a batch of 5 examples."""
    x, mask, y = padded(items)
    return {"places": torch.arange(TALL), "near": NEAR, "x": x, "mask": mask, "y": y} | {
        "factors": TABLE.flip(0)
    }


def numbered(items: list[Item]) -> dict[str, Any]:
    x, mask, y = padded(items)
    return {"x": x, "mask": mask, "y": y, "count": len(items), "longest": x.shape[1]}


def of_numbered(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    x = batch["x"][: batch["count"], : batch["longest"]]
    assert x.shape == batch["x"].shape
    return x, batch["mask"], batch["y"]


def strings(items: list[Item]) -> dict[str, Any]:
    x, mask, y = padded(items)
    names = [f"{len(x)} long" for x, _ in items]
    return {"in": [(x, {"mask": mask}), names], "y": y}


def of_strings(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    (x, inner), names = batch["in"]
    assert len(names) == len(x)
    factors = torch.tensor([float(name.split()[0]) for name in names], dtype=x.dtype)
    return x * factors[:, None, None], inner["mask"], batch["y"]


Form = tuple[Callable[[list[Item]], Any], Callable[[Any], tuple[Tensor, Tensor, Tensor]]]
FORMS: dict[str, Form] = {
    "UserDict": (
        lambda items: Batch(zip(("x", "mask", "y"), padded(items), strict=True)),
        lambda batch: (batch["x"], batch.mask, batch.y),
    ),
    "immutable mapping": (
        lambda items: types.MappingProxyType(
            dict(zip(("x", "mask", "y"), padded(items), strict=True))
        ),
        lambda batch: (batch["x"], batch["mask"], batch["y"]),
    ),
    "dataclass": (lambda items: Record(*padded(items)), lambda b: (b.x, b.mask, b.y)),
    "frozen dataclass": (
        lambda items: Frozen(Record(*padded(items)), [str(len(x)) for x, _ in items]),
        lambda b: (b.inner.x, b.inner.mask, b.inner.y),
    ),
    "object": (lambda items: Thing(*padded(items)), lambda b: (b.x, b.mask, b.y)),
    "closed object": (lambda items: Closed(*padded(items)), lambda b: b.parts),
    "named tuple": (lambda items: Named(*padded(items)), tuple),
    "arrays": (
        lambda items: [part.numpy() for part in padded(items)],
        lambda batch: tuple(torch.from_numpy(np.asarray(part)) for part in batch),
    ),
    "nested, with strings": (strings, of_strings),
    "list of unequal tensors": (
        lambda items: {"parts": [x for x, _ in items], "y": torch.stack([y for _, y in items])},
        of_list,
    ),
    "left padding": (lambda items: padded(items, padding_side="left"), tuple),
    "places first": (
        lambda items: [padded(items)[0].transpose(0, 1), padded(items)[1].T, padded(items)[2]],
        lambda batch: (batch[0].transpose(0, 1), batch[1].T, batch[2]),
    ),
    "packed": (
        lambda items: (
            pack_sequence([x for x, _ in items], enforce_sorted=False),
            torch.stack([y for _, y in items]),
        ),
        of_packed,
    ),
    "graph": (graph, of_graph),
    "offsets": (offsets, of_offsets),
    "numbers": (numbered, of_numbered),
}
if "padding_side" not in pad_sequence.__code__.co_varnames:  # torch before 2.5
    del FORMS["left padding"]


def singly(module: Net, data: Dataset, collate: Callable[[list[Item]], Any]) -> Tensor:
    """Scores, by batches of one and plain autograd."""
    losses = [module.losses(collate([data[n]])).sum() for n in range(SIZE)]
    return by_hand(module, losses, losses)


@pytest.mark.filterwarnings("ignore:Per-example gradients of")
@pytest.mark.filterwarnings("ignore:In some batches the examples share")
@pytest.mark.parametrize("name", FORMS)
def test_every_structure(name: str) -> None:
    collate, read = FORMS[name]
    module, data = Net(read), Sequences()
    expected = singly(module, data, collate)
    loader = DataLoader(data, 4, collate_fn=collate)
    run = standing_run(module, [[n] for n in range(SIZE)])
    scores = tracin(module, run, loader, loader)
    torch.testing.assert_close(scores.values, expected)
    notes = [note for note in scores.provenance["notes"] if not note.startswith(("Through", "In"))]
    assert notes == []
    errors = AttributionModule(module, run, TracIn()).check(loader, loader, examples=3)
    assert max(errors.values()) < 1e-10


@pytest.mark.filterwarnings("ignore:In some batches the examples share")
@pytest.mark.parametrize("size", [4, TALL, SIZE])
def test_what_belongs_to_no_example_is_not_cut(size: int) -> None:
    module, data = Net(with_places), Sequences(same_length=True)
    expected = singly(module, data, places)
    loader = DataLoader(data, size, collate_fn=places)
    scores = tracin(module, standing_run(module, [[n] for n in range(SIZE)]), loader, loader)
    torch.testing.assert_close(scores.values, expected)


def by_length(items: list[Item]) -> list[Any]:
    """As for pack_padded_sequence without enforce_sorted=False."""
    items = sorted(items, key=lambda item: -len(item[0]))
    x, mask, y = padded(items)
    return [pack_padded_sequence(x, mask.sum(1).long(), batch_first=True), y]


def sorted_and_padded(items: list[Item]) -> Any:
    return padded(sorted(items, key=lambda item: -len(item[0])))


def recorded(module: Net, loader: DataLoader, path: Path) -> Trajectory:
    recorder = TrajectoryRecorder(path, num_checkpoints=1)
    quiet(max_epochs=1, callbacks=[recorder]).fit(module, loader)
    return Trajectory.load(path)


@pytest.mark.parametrize(
    ("collate", "kept", "read"),
    [
        (by_length, FORMS["packed"][0], of_packed),
        (sorted_and_padded, padded, tuple),
    ],
)
def test_a_loader_that_sorts_is_read_one_by_one(
    collate: Any, kept: Any, read: Any, tmp_path: Path
) -> None:
    module, data = Net(read), Sequences()
    loader = DataLoader(data, 4, collate_fn=collate)
    run = recorded(module, loader, tmp_path / "run")
    expected = singly(module, data, collate)
    scores = AttributionModule(module, run, TracIn()).attribute(loader, loader, trainer=quiet())
    rates = float(run.steps.learning_rate.sum())
    torch.testing.assert_close(scores.values, rates * expected)
    assert any("another order" in note and "slow" in note for note in scores.provenance["notes"])
    found = measure(module, None, run.checkpoints[run.last_step].parameters, loader)
    alone = torch.cat([module.losses(collate([data[n]])) for n in range(SIZE)])
    torch.testing.assert_close(found, alone.detach())
    for ask in (
        lambda: retrain(run, module, None, loader, torch.ones(SIZE)),
        lambda: AttributionModule(module, run, Unrolled()).attribute(
            loader, loader, trainer=quiet()
        ),
    ):
        with pytest.raises(ValueError, match="another order .*enforce_sorted=False"):
            ask()
    # Gradients of single examples are all that this needs of the recorded batches.
    estimator = Source(1, order="recorded", curvature="identity")
    same = [
        AttributionModule(module, run, estimator).attribute(one, one, trainer=quiet())
        for one in (loader, DataLoader(data, 4, collate_fn=kept))
    ]
    torch.testing.assert_close(same[0].values, same[1].values)


def standardised(items: list[Item]) -> Any:
    x, mask, y = padded(items)
    return (x - x.mean()) / x.std(), mask, y


def balanced(items: list[Item]) -> Any:
    x, mask, y = padded(items)
    return {"x": x, "mask": mask, "y": y, "tokens": float(mask.sum())}


def test_examples_that_depend_on_their_batch_are_refused() -> None:
    data = Sequences()
    module = Net(tuple)
    run = standing_run(module, [[n] for n in range(SIZE)])
    for collate, place in ((standardised, r"\[0\]"), (balanced, r"\['tokens'\]")):
        loader = DataLoader(data, 4, collate_fn=collate)
        with pytest.raises(ValueError, match=f"holds at {place} depends on all its examples"):
            tracin(module, run, loader, loader)


def noisy(items: list[Item]) -> Any:
    return padded([(x + 0.1 * torch.randn(x.shape, dtype=x.dtype), y) for x, y in items])


def taking(items: list[dict[str, Any]]) -> Any:
    """Takes its examples apart."""
    return padded([(item.pop("x"), item.pop("y")) for item in items])


class Dictionaries(Sequences):
    def __init__(self) -> None:
        super().__init__()
        self.items = [{"x": x, "y": y} for x, y in zip(self.x, self.y, strict=True)]

    def __getitem__(self, index: int) -> Any:
        return dict(self.items[index])


def test_a_collate_function_may_draw_or_take_apart() -> None:
    module = Net(tuple)
    for data, collate in ((Sequences(), noisy), (Dictionaries(), taking)):
        source = ExampleSource.of(DataLoader(data, 4, collate_fn=collate), 1, "training")
        batch = collate([data[n] for n in range(4)])
        state = torch.get_rng_state()
        assert source.checked(module) is source
        assert source.rule_of(batch, range(4), module).whole
        assert torch.equal(torch.get_rng_state(), state)


class Unwrapping(TrainingStepTask):
    """Batches that nobody else can cut: the task says how."""

    def __init__(self) -> None:
        super().__init__()
        self._cut = 0

    def example(self, batch: Any, index: int) -> Any:
        self._cut += 1
        return Closed(*(part[index : index + 1] for part in batch.parts))


def test_a_task_may_cut_batches_itself() -> None:
    collate = FORMS["closed object"][0]
    module, data = Net(FORMS["closed object"][1]), Sequences()
    expected = singly(module, data, collate)
    loader = DataLoader(data, 4, collate_fn=collate)
    run = standing_run(module, [[n] for n in range(SIZE)])
    task = Unwrapping()
    attribution = AttributionModule(module, run, TracIn(), task)
    scores = attribution.attribute(loader, loader, trainer=quiet())
    torch.testing.assert_close(scores.values, expected)
    assert task._cut > 0
    # By default it is the slice, or the example read again.
    source = ExampleSource.of(loader, 4, "training")
    batch = source.batch([3, 7], module)
    assert all(map(torch.equal, AttributionTask.example(task, batch, 1).parts, padded([data[7]])))


@pytest.mark.filterwarnings("ignore:Per-example gradients of")
@pytest.mark.filterwarnings("ignore:In some batches the examples share")
@pytest.mark.parametrize("name", ["UserDict", "packed", "graph"])
def test_runs_on_every_structure_are_replayed(name: str, tmp_path: Path) -> None:
    collate, read = FORMS[name]
    module, data = Net(read), Sequences()
    loader = DataLoader(data, 4, shuffle=True, collate_fn=collate)
    run = recorded(module, loader, tmp_path / "run")
    weights = torch.ones(SIZE, dtype=torch.float64)
    assert landing_error(run, retrain(run, module, None, loader, weights)) == 0
    scores = AttributionModule(module, run, Unrolled()).attribute(loader, loader, trainer=quiet())
    measured = []
    for change in (1e-6, -1e-6):
        weights[6] = 1 + change
        measured.append(measure(module, None, retrain(run, module, None, loader, weights), loader))
    slope = (measured[0] - measured[1]) / 2e-6
    torch.testing.assert_close(scores.values[:, 6], -slope, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:Per-example gradients of")
def test_other_labels_in_batches_with_tables() -> None:
    """A relabelled batch is cut as the one that it was."""
    module, data = Net(with_places), Sequences(same_length=True)
    loader = DataLoader(data, TALL, collate_fn=places)
    run = standing_run(module, [[n] for n in range(SIZE)])
    others = [module.losses(places([(data[n][0], 1 - data[n][1])])).sum() for n in range(4)]
    own = [module.losses(places([data[n]])).sum() for n in range(SIZE)]
    changes = [after - before for after, before in zip(others, own, strict=False)]
    expected = -by_hand(module, changes, own) * len(changes) / SIZE
    edits = [Relabel(n, int(1 - data[n][1])) for n in range(4)]
    scores = tracin(module, run, loader, loader, edits=edits)
    torch.testing.assert_close(scores.values, expected)


def test_unpacking_is_exact() -> None:
    """What a packed sequence is cut into is what packing one example gives."""
    items = [Sequences()[n] for n in range(6)]
    packed = pack_sequence([x for x, _ in items], enforce_sorted=False)
    for n, part in enumerate(unpack_sequence(packed)):
        assert torch.equal(part, items[n][0])
