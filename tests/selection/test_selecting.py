"""Choosing from a pool, on least squares where the best example is known in closed form."""

import csv
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import InfluenceFunction, TracIn, Unrolled
from tda_lightning.evaluation import retrain
from tda_lightning.index import AttributionIndex
from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.errors import NonFiniteError, UnsupportedTrainingError
from tda_lightning.selection import Selection, select
from tda_lightning.selection.selection import load_chosen, save_chosen
from tests.attributing import quiet
from tests.processes import connect, results

RATE, DIMENSION, COUNT = 0.05, 4, 24
torch.set_num_threads(1)


class Line(LightningModule):
    def __init__(self, momentum: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(DIMENSION, 1, bias=False, dtype=torch.float64)
        self.momentum = momentum

    def training_step(self, batch: Any, _: int) -> Tensor:
        inputs, targets = batch
        return (self.layer(inputs) - targets).square().mean() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE, momentum=self.momentum)


def examples(size: int, seed: int, shift: float = 0.0) -> TensorDataset:
    own = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, DIMENSION, generator=own, dtype=torch.float64)
    noise = torch.randn(size, 1, generator=own, dtype=torch.float64)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True) + noise + shift)


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Any:
    folder = str(tmp_path_factory.mktemp("run"))
    torch.manual_seed(0)
    module, train = Line(momentum=0.5), examples(COUNT, 0)
    recorder = TrajectoryRecorder(folder, overwrite=True, num_checkpoints=2)
    quiet(max_epochs=6, callbacks=[recorder]).fit(
        module, torch.utils.data.DataLoader(train, batch_size=COUNT)
    )
    return module, Trajectory.load(folder), train


def weights_of(selection: Selection) -> Tensor:
    return selection.states[0]["layer.weight"].flatten()


def by_hand(
    run: Any, pool: TensorDataset, target: TensorDataset, k: int, steps: int, rate: float
) -> tuple[list[int], list[float], Tensor]:
    """Every gradient and the Hessian written down: the choices, their scores, and the weights."""
    _, trajectory, train = run
    last = trajectory.checkpoints[trajectory.last_step]
    weights = last.parameters["layer.weight"].flatten().clone()
    buffer = last.optimizer["layer.weight"]["momentum_buffer"].flatten().clone()
    own = trajectory.data_weights
    own = torch.ones(COUNT, dtype=torch.float64) if own is None else own
    hessian = (train.tensors[0].T * own) @ train.tensors[0] / COUNT

    def gradients(data: TensorDataset) -> Tensor:
        inputs, targets = data.tensors
        return (inputs @ weights - targets.flatten())[:, None] * inputs

    chosen, scores = [], []
    for _ in range(steps):
        asked = torch.linalg.solve(hessian, gradients(target).mean(0))
        # To add an example changes the optimum by -H^-1 g / N.
        changes = -gradients(pool) @ asked / COUNT
        best = changes.argsort()[:k]
        chosen += best.tolist()
        scores += changes[best].tolist()
        buffer = 0.5 * buffer + gradients(pool)[best].mean(0)
        weights = weights - rate * buffer
    return chosen, scores, weights


EXACT = InfluenceFunction("exact", damping=0.0)


@pytest.mark.parametrize("weighted", [False, True])
def test_choices_scores_and_training_are_those_of_the_closed_form(run: Any, weighted: bool) -> None:
    module, trajectory, train = run
    if weighted:  # as WeightedTraining records it
        own = 2 * torch.rand(COUNT, generator=torch.Generator().manual_seed(6)).double()
        run = module, replace(trajectory, data_weights=own), train
        trajectory = run[1]
    pool, target = examples(30, 1), examples(8, 2, shift=1.0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = select(
        AttributionModule(module, trajectory, EXACT),
        train,
        pool,
        target,
        k=3,
        steps=3,
        anchors=8,
        neighbours=30,
        replicas=1,
        rate=0.2,
    )
    chosen, scores, weights = by_hand(run, pool, target, k=3, steps=3, rate=0.2)
    assert [own.index for own in found.choices] == chosen
    assert len(set(chosen)) > 3  # not the same ones in every step
    own = torch.tensor([choice.score for choice in found.choices], dtype=torch.float64)
    torch.testing.assert_close(own, torch.tensor(scores, dtype=torch.float64), rtol=1e-8, atol=0)
    torch.testing.assert_close(weights_of(found), weights, rtol=1e-10, atol=0)
    inputs, targets = target.tensors
    losses = (inputs @ weights[:, None] - targets).square().mean() / 2
    torch.testing.assert_close(found.measurements[0, -1].double(), losses, rtol=1e-6, atol=0)
    assert found.measurements.shape == (1, 4)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_only_the_neighbours_of_the_anchors_are_looked_at(run: Any) -> None:
    module, trajectory, train = run
    pool, target = examples(30, 1), examples(5, 3)
    found = select(
        AttributionModule(module, trajectory, TracIn()),
        train,
        pool,
        target,
        k=30,
        steps=1,
        anchors=1,
        neighbours=4,
        replicas=2,
        seed=5,
    )
    distances = torch.cdist(target.tensors[0], pool.tensors[0])
    for replica in (0, 1):
        draw = torch.Generator().manual_seed(5 + replica)
        anchor = int(torch.randperm(5, generator=draw)[0])
        near = set(distances[anchor].argsort()[:4].tolist())
        chosen = {own.index for own in found.choices if own.replica == replica}
        assert chosen and chosen <= near
    assert all(own.score < 0 for own in found.choices)


def test_only_what_an_index_finds_helpful_is_looked_at(run: Any, tmp_path: Any) -> None:
    """The pool holds training examples too, which the index finds and selection leaves out."""
    module, trajectory, train = run
    both = zip(examples(COUNT, 0).tensors, examples(30, 1).tensors, strict=True)
    pool, target = TensorDataset(*(torch.cat(pair) for pair in both)), examples(5, 3)
    attribution = AttributionModule(module, trajectory, EXACT)
    index = AttributionIndex.build(
        attribution, train, tmp_path / "index", bytes_per_example=1 << 12, dtype="float64"
    )
    options = {"k": 30, "steps": 1, "anchors": 1, "neighbours": 4, "replicas": 1, "seed": 5}
    with pytest.raises(ValueError, match="expected them to be appended"):
        select(attribution, train, pool, target, index=index, **options)
    index.append(pool)
    found = select(attribution, train, pool, target, index=index, **options)
    anchor = int(torch.randperm(5, generator=torch.Generator().manual_seed(5))[0])
    asked = TensorDataset(*(own[anchor : anchor + 1] for own in target.tensors))
    whole = attribution.attribute(train, asked, pool=pool).values[0]
    helpful = [n for n in whole.argsort().tolist() if n >= COUNT][:4]
    assert {own.index for own in found.choices} == set(helpful)
    with pytest.raises(ValueError, match="expected one of the two"):
        select(attribution, train, pool, target, index=index, layer="layer")
    other = AttributionModule(module, trajectory, TracIn())
    with pytest.raises(ValueError, match="built with InfluenceFunction"):
        select(other, train, pool, target, index=index)


def test_a_pool_that_overlaps_is_counted_and_left_out(run: Any) -> None:
    module, trajectory, train = run
    new = examples(6, 7)
    pool = TensorDataset(
        *(
            torch.cat([a[:110], b])
            for a, b in zip(examples(COUNT, 0).tensors, new.tensors, strict=True)
        )
    )
    attribution = AttributionModule(module, trajectory, EXACT)
    found = select(attribution, train, pool, examples(4, 2), k=2, steps=2, replicas=1)
    assert f"{COUNT} of the {COUNT + 6} examples" in found.notes[0]
    assert all(own.index >= COUNT for own in found.choices)
    with pytest.raises(ValueError, match=f"All {COUNT} examples of the pool"):
        select(attribution, train, train, examples(4, 2))


def test_a_target_of_one_class_is_warned_of(run: Any) -> None:
    module, trajectory, train = run
    target = examples(4, 2)
    same = TensorDataset(target.tensors[0], torch.full((4, 1), 2.0, dtype=torch.float64))
    attribution = AttributionModule(module, trajectory, EXACT)
    with pytest.warns(UserWarning, match="All 4 examples of the target have the label 2.0"):
        found = select(attribution, train, examples(9, 1), same, k=1, steps=1, replicas=1)
    assert "answer 2.0 to everything" in found.notes[0]
    assert set(found.labels) == {own.index for own in found.choices}


def test_nothing_that_helps(run: Any) -> None:
    module, trajectory, train = run
    target = examples(1, 2, shift=9.0)
    # The opposite of the target: every step on it makes the target worse.
    pool = TensorDataset(target.tensors[0], target.tensors[1] - 1e3)
    with pytest.raises(ValueError, match="nothing to choose"):
        select(AttributionModule(module, trajectory, EXACT), train, pool, target, replicas=1)


def test_settings_that_cannot_be(run: Any, tmp_path: Any) -> None:
    module, trajectory, train = run
    pool, target = examples(9, 1), examples(4, 2)
    attribution = AttributionModule(module, trajectory, EXACT)
    for name in ("k", "steps", "anchors", "neighbours", "replicas"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
            select(attribution, train, pool, target, **{name: 0})
    with pytest.raises(ValueError, match="rate must be a number above 0"):
        select(attribution, train, pool, target, rate=-1.0)
    with pytest.raises(ValueError, match="empty"):
        select(attribution, train, TensorDataset(torch.zeros(0, 4)), target)
    with pytest.raises(ValueError, match="no layer 'layr'"):
        select(attribution, train, pool, target, layer="layr")
    with pytest.raises(UnsupportedTrainingError, match="Addition"):
        select(AttributionModule(module, trajectory, Unrolled()), train, pool, target)
    with pytest.raises(NonFiniteError, match="smaller rate"):
        select(attribution, train, pool, target, rate=1e200, replicas=1)
    attribution.members *= 2
    with pytest.raises(UnsupportedTrainingError, match="got 2 runs of 1 stages"):
        select(attribution, train, pool, target)


def chosen_in(rank: int | None, run: Any) -> Any:
    """What is chosen, and the recorded run trained again with weights, in a process group or
    without one."""
    if rank is not None:
        connect(rank)
    module, trajectory, train = run
    attribution = AttributionModule(module, trajectory, EXACT)
    found = select(attribution, train, examples(9, 1), examples(4, 2), k=2, steps=2, replicas=1)
    state = retrain(trajectory, Line(momentum=0.5), None, train, torch.arange(COUNT).double())
    scores = torch.tensor([own.score for own in found.choices], dtype=torch.float64)
    indices = [own.index for own in found.choices]
    return indices, scores, found.measurements, weights_of(found), state["layer.weight"]


@pytest.mark.slow  # it starts two processes
def test_in_two_processes_each_does_the_whole(run: Any) -> None:
    indices, *expected = chosen_in(None, run)
    for own, *found in results(chosen_in, run):
        assert own == indices
        for value, alone in zip(found, expected, strict=True):
            torch.testing.assert_close(value, alone, rtol=1e-12, atol=1e-14)


def test_training_that_does_harm_is_noted(run: Any) -> None:
    module, trajectory, train = run
    attribution = AttributionModule(module, trajectory, EXACT)
    pool, target = examples(9, 1), examples(4, 2)
    found = select(attribution, train, pool, target, k=1, steps=1, replicas=2, rate=1e-3)
    assert not found.notes and bool((found.measurements[:, 1] < found.measurements[:, 0]).all())
    found = select(attribution, train, pool, target, k=1, steps=1, replicas=2, rate=9.0)
    assert "made the target worse in 2 of 2 replicas" in found.notes[0]


def test_files(run: Any, tmp_path: Any) -> None:
    module, trajectory, train = run
    found = select(
        AttributionModule(module, trajectory, EXACT),
        train,
        examples(9, 1),
        examples(4, 2),
        k=2,
        steps=1,
        replicas=2,
    )
    found.write_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == [own.index for own in found.choices]
    assert [float(row["score"]) for row in rows] == [own.score for own in found.choices]
    save_chosen(found.indices, 9, {"num_train": 5}, tmp_path / "a.json")
    assert load_chosen(tmp_path / "a.json") == (found.indices, 9, {"num_train": 5})
    save_chosen([3, 3], 9, {}, tmp_path / "b.json")
    with pytest.raises(ValueError, match="an index twice"):
        load_chosen(tmp_path / "b.json")
    save_chosen([9], 9, {}, tmp_path / "b.json")
    with pytest.raises(ValueError, match="index 9 of a pool of 9"):
        load_chosen(tmp_path / "b.json")
    (tmp_path / "b.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a file of chosen examples"):
        load_chosen(tmp_path / "b.json")
    with pytest.raises(FileNotFoundError, match="tda select"):
        load_chosen(tmp_path / "c.json")
