"""Curvature statistics gathered in training, against loops and against the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Trajectory
from tda_lightning.curvature import sides
from tda_lightning.curvature.recorded import shrunk
from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tda_lightning.gradients import GradientEngine
from tda_lightning.gradients.moments import FULL
from tda_lightning.gradients.observer import Observer
from tda_lightning.recording import TrajectoryRecorder, curvature_statistics
from tda_lightning.records.curvature_statistics import BlockStatistics
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.store import open_trajectory
from tda_lightning.store.inspect import describe
from tda_lightning.store.statistics_folder import StatisticsFolder
from tda_lightning.tasks import ClassificationTask, RegressionTask, seeded_examples
from tests.attributing import relative, watched_walks
from tests.curvature.test_wide_sides import VOCABULARY, Largest
from tests.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(LightningModule):
    """Any network with a standard loss; SGD unless told otherwise."""

    def __init__(self, network: nn.Module, loss: Any = F.cross_entropy, optimizer: Any = None):
        super().__init__()
        self.network, self.loss, self.optimizer_of = network, loss, optimizer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, target = batch
        return self.loss(self(inputs), target)

    def configure_optimizers(self) -> Any:
        if self.optimizer_of is not None:
            return self.optimizer_of(self.parameters())
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Sequence(nn.Module):
    """Everything with positions: embedding, attention with dropout, recurrence, norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.places = nn.Parameter(0.1 * torch.randn(5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.2)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, dropout=0.2)
        self.gru = nn.GRU(6, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.places
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        hidden = self.lstm(self.norm(hidden))[0].transpose(0, 1)
        return self.head(self.gru(hidden)[0][-1])


class Tied(nn.Module):
    """A layer called twice, and an embedding that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.middle = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.middle(self.middle(self.embedding(tokens)).tanh()).mean(1)
        return F.linear(hidden, self.embedding.weight)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same"),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, bias=False, groups=2, stride=2, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def pictures(size: int) -> Tensor:
    return torch.randn(size, 2, 8, 8)


def tokens(size: int) -> Tensor:
    return torch.randint(11, (size, 5))


def vectors(size: int) -> Tensor:
    return torch.randn(size, 4)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


Made = Callable[[], nn.Module]
NETWORKS: dict[str, tuple[Made, Callable[[int], Tensor]]] = {
    "convolutions": (convolutions, pictures),
    "sequence": (Sequence, tokens),
    "tied": (Tied, tokens),
    "mlp": (mlp, vectors),
}


def data(inputs: Callable[[int], Tensor], size: int = 40, classes: int = 3) -> TensorDataset:
    torch.manual_seed(3)
    return TensorDataset(inputs(size), torch.randint(classes, (size,)))


def run(
    path: Path | None,
    module: Callable[[], LightningModule],
    dataset: Any,
    recorder: dict[str, Any] | None = None,
    double: bool = False,
    **options: Any,
) -> LightningModule:
    """Train two epochs of five batches; online curvature at every step unless told otherwise."""
    seed_everything(7, verbose=False)
    made = module()
    made = made.double() if double else made
    settings = {"curvature": "online", "curvature_every": 1, **(recorder or {})}
    recorders = [TrajectoryRecorder(path, **settings)] if path else []
    trainer(*recorders, **options).fit(made, DataLoader(dataset, 8, shuffle=True))
    return made


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_is_gathered(precision: str, tmp_path: Path) -> None:
    dataset = data(
        lambda n: vectors(n).to(torch.float64 if precision == "64-true" else torch.float32)
    )
    run(tmp_path, lambda: Model(mlp()), dataset, precision=precision)
    run(tmp_path / "plain", lambda: Model(mlp()), data(vectors))
    found, plain = (
        open_trajectory(path).merged_statistics(0, 10) for path in (tmp_path, tmp_path / "plain")
    )
    for name, block in plain.items():
        assert found[name].left.dtype == torch.float32
        torch.testing.assert_close(found[name].right, block.right, rtol=0.1, atol=0.5)
        assert float(found[name].trace) == pytest.approx(float(block.trace), rel=0.1)


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_the_same_bit_for_bit(network: str, fisher: str, tmp_path: Path) -> None:
    make, inputs = NETWORKS[network]
    ends = [
        run(path, lambda: Model(make()), data(inputs), {"fisher": fisher})
        for path in (None, tmp_path)
    ]
    plain, recorded = (module.state_dict() for module in ends)
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    statistics = open_trajectory(tmp_path).merged_statistics(0, 10)
    # Every trained parameter belongs to a block, and every example was counted.
    found = [name for block in statistics.values() for name in block.parameters]
    assert sorted(found) == sorted(f"{name}" for name, _ in ends[1].named_parameters())
    assert all(float(block.trace) > 0 for block in statistics.values())


def sides_by_hand(module: Model, batch: Any, weight: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums of b b^T and a a^T of each linear layer, by plain loops, for the losses weighted by
    ``weight`` per example."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {n: p for n, p in module.named_modules() if isinstance(p, nn.Linear)}
    for index in range(len(batch[0])):
        noted: dict[str, list[Tensor]] = {name: [] for name in layers}
        hooks = [
            layer.register_forward_hook(lambda m, i, o, to=noted[name]: to.extend([i[0], o]))
            for name, layer in layers.items()
        ]
        one = [part[index : index + 1] for part in batch]
        loss = module.loss(module(one[0]), one[1]) * weight[index]
        for hook in hooks:
            hook.remove()
        for name, (given, out) in noted.items():
            (b,) = torch.autograd.grad(loss, out, retain_graph=True)
            a = torch.cat([given, torch.ones(1, 1, dtype=given.dtype)], 1)
            left, right = kept.get(name, (0, 0))
            kept[name] = (left + b.T @ b, right + (a.T @ a).detach())
    return kept


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
def test_empirical_factors_equal_a_plain_loop(options: dict[str, Any], tmp_path: Path) -> None:
    dataset = data(lambda n: vectors(n).double())
    run(
        tmp_path,
        lambda: Model(mlp()),
        dataset,
        {"fisher": "empirical", "every_n_steps": 1},
        double=True,
        max_epochs=1,
        **options,
    )
    trajectory = open_trajectory(tmp_path)
    module = Model(mlp()).double()
    for step in range(1, trajectory.num_steps + 1):
        start = trajectory.checkpoints[step - 1]
        module.load_state_dict({**start.parameters, **start.buffers})
        expected: dict[str, Any] = {}
        count = 0
        for indices in trajectory.steps.batches(step - 1):  # every accumulated one
            batch = [part[indices] for part in dataset.tensors]
            ones = torch.ones(len(indices), dtype=torch.float64)
            count += len(indices)
            for name, pair in sides_by_hand(module, batch, ones).items():
                before = expected.get(name, (0, 0))
                expected[name] = tuple(a + b for a, b in zip(before, pair, strict=True))
        found = trajectory.statistics[step - 1, step]
        for name, (left, right) in expected.items():
            torch.testing.assert_close(found[name].left[0].double(), left, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(found[name].right[0].double(), right, rtol=1e-5, atol=1e-7)
            assert float(found[name].examples) == float(found[name].count) == count


def test_a_scaler_does_not_scale_the_statistics(tmp_path: Path) -> None:
    dataset = data(vectors)
    for name, plugins in (("plain", []), ("scaled", [scaling()])):
        run(
            tmp_path / name,
            lambda: Model(mlp()),
            dataset,
            {"fisher": "empirical"},
            max_steps=1,
            plugins=plugins,
        )
    plain, scaled = (
        open_trajectory(tmp_path / name).merged_statistics(0, 1) for name in ("plain", "scaled")
    )
    for name in plain:
        # The scaled run computes in half precision.
        torch.testing.assert_close(scaled[name].left, plain[name].left, rtol=0.1, atol=1e-2)


def scaling() -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return MixedPrecision("16-mixed", "cpu", scaler)


LOSSES: dict[str, tuple[Any, Any, Callable[[int], Tensor]]] = {
    "cross entropy": (F.cross_entropy, ClassificationTask(), lambda n: torch.randint(3, (n,))),
    "squared": (F.mse_loss, RegressionTask(), lambda n: torch.randn(n, 3).double()),
    "scaled by hand": (
        lambda o, y: 2 * F.mse_loss(o, y, reduction="none").sum(1).mean(),
        None,
        lambda n: torch.randn(n, 3).double(),
    ),
    "target first": (
        lambda o, y: F.mse_loss(y, o),
        RegressionTask(),
        lambda n: torch.randn(n, 3).double(),
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_sampled_factors_equal_the_engines(case: str, tmp_path: Path) -> None:
    """The same labels (seed, example) through the engine's own forward pass."""
    loss, task, targets = LOSSES[case]
    torch.manual_seed(3)
    dataset = TensorDataset(vectors(40).double(), targets(40))
    run(tmp_path, lambda: Model(mlp(), loss), dataset, {"every_n_steps": 1}, double=True)
    trajectory = open_trajectory(tmp_path)
    module = Model(mlp(), loss).double()
    from tda_lightning.tasks import as_task

    task = as_task(task)
    for step in (1, 4, 10):
        start = trajectory.checkpoints[step - 1]
        module.load_state_dict({**start.parameters, **start.buffers})
        indices = trajectory.steps.batches(step - 1)[0]
        batch = [part[indices] for part in dataset.tensors]
        engine = GradientEngine(module, list(trajectory.facts.parameters))
        with seeded_examples(0, indices):
            task.prepare(module, batch)

        def sampled(m: Any, b: Any, i: Tensor) -> Tensor:
            with seeded_examples(step, i):  # noqa: B023
                return task.sampled_loss(m, b)

        engine.discover(sampled, batch, indices)
        gradients = engine.gradients(sampled, batch, indices).blocks
        found = trajectory.statistics[step - 1, step]
        for name, gradient in gradients.items():
            left, right, count = gradient.covariances((FULL, FULL))
            block = found[name]
            torch.testing.assert_close(block.left.double(), left, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(block.right.double(), right, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(block.count.double(), count)
            trace = gradient.weighted_squares(None, None, None).sum()
            torch.testing.assert_close(block.trace[0].double(), trace, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("fisher", "passes"), [("true", 11), ("empirical", 2)])
def test_only_the_true_fisher_takes_backward_passes(
    fisher: str, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at each watched step, and for either two on the first batch: one checks it, one shows
    where the examples are."""
    count, backward = [0], Observer.backward

    def counted(*args: Any) -> Any:
        count[0] += 1
        return backward(*args)

    monkeypatch.setattr(Observer, "backward", counted)
    run(tmp_path, lambda: Model(mlp()), data(vectors), {"fisher": fisher})
    assert count == [passes]
    assert float(open_trajectory(tmp_path).merged_statistics(0, 10)["network.0"].examples) == 80


def test_a_large_batch_is_stood_for_by_its_first_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature_statistics, "_ROWS", 3)
    monkeypatch.setattr(curvature_statistics, "_NORMS", 2)
    dataset = data(lambda n: vectors(n).double())
    settings = {"fisher": "empirical", "every_n_steps": 1}
    run(tmp_path, lambda: Model(mlp()), dataset, settings, double=True, max_epochs=1)
    trajectory = open_trajectory(tmp_path)
    module = Model(mlp()).double()
    for step in range(1, 6):
        module.load_state_dict(dict(trajectory.checkpoints[step - 1].parameters))
        indices = trajectory.steps.batches(step - 1)[0]
        assert len(indices) == 8
        first = [part[indices[:3]] for part in dataset.tensors]
        found = trajectory.statistics[step - 1, step]
        for name, (left, right) in sides_by_hand(module, first, torch.ones(3)).items():
            block = found[name]
            torch.testing.assert_close(block.left[0].double(), left, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(block.right[0].double(), right, rtol=1e-5, atol=1e-7)
            assert [float(n) for n in (block.examples, block.count, *block.samples)] == [3] * 4
        two = [part[indices[:2]] for part in dataset.tensors]
        squares = dict.fromkeys(found, 0.0)
        for example in range(2):
            loss = module.loss(module(two[0][example : example + 1]), two[1][example : example + 1])
            gradients = torch.autograd.grad(loss, list(module.parameters()))
            for (name, _), gradient in zip(module.named_parameters(), gradients, strict=True):
                squares[name.rpartition(".")[0]] += float(gradient.square().sum())
        for name, total in squares.items():
            # The mean of two, for each of the three.
            assert float(found[name].trace) == pytest.approx(total / 2 * 3, rel=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_sums_of_intervals_equal_those_of_the_merged_interval(network: str, tmp_path: Path) -> None:
    make, inputs = NETWORKS[network]
    for every in (2, 5):
        settings = {"every_n_steps": every, "curvature_dtype": "float64"}
        run(tmp_path / str(every), lambda: Model(make()), data(inputs), settings)
    fine, coarse = (open_trajectory(tmp_path / str(every)) for every in (2, 5))
    assert list(fine.statistics) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert list(coarse.statistics) == [(0, 5), (5, 10)]
    one, other = fine.merged_statistics(0, 10), coarse.merged_statistics(0, 10)
    assert one.keys() == other.keys()
    for name in one:
        for total in BlockStatistics.SUMS:
            torch.testing.assert_close(
                getattr(one[name], total), getattr(other[name], total), rtol=1e-12, atol=0
            )


def test_steps_in_between_are_left_alone(tmp_path: Path) -> None:
    settings = {"every_n_steps": 1, "curvature_every": 4}
    run(tmp_path, lambda: Model(mlp()), data(vectors), settings)
    statistics = open_trajectory(tmp_path).statistics
    assert [interval[1] for interval, found in statistics.items() if found] == [4, 8]


@pytest.mark.parametrize(
    ("options", "every"),
    [
        ({"num_checkpoints": 1}, 3),  # 10 steps: three in the interval of ten
        ({"num_checkpoints": 2}, 1),
        ({"num_checkpoints": 10}, 1),
        ({"every_n_steps": 7}, 2),
        ({"every_n_epochs": 1}, 64),
    ],
)
def test_short_intervals_are_watched_more_often(
    options: dict[str, int], every: int, tmp_path: Path
) -> None:
    settings = {**options, "curvature_every": None}
    run(tmp_path, lambda: Model(mlp()), data(vectors), settings)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.facts.settings["curvature"]["every"] == every
    watched = sum(8 * (len(found) > 0) for found in trajectory.statistics.values())
    examples = trajectory.merged_statistics(0, 10).get("network.0")
    assert (examples is None) == (every > 10)
    if examples is not None:
        assert float(examples.examples) == 8 * (10 // every) >= watched


def test_sides_are_kept_as_they_are(tmp_path: Path) -> None:
    run(tmp_path, lambda: Model(Sequence()), data(tokens), {"curvature_dtype": "float64"})
    trajectory = open_trajectory(tmp_path)
    blocks = trajectory.merged_statistics(0, 10)
    embedding = blocks["network.embedding"]
    assert embedding.left.shape == (1, 11)  # one-hot inputs have a diagonal covariance
    assert embedding.left.sum() == embedding.count  # a token that is repeated counts once
    assert 3 * 8 * 10 < float(embedding.count) < 5 * 8 * 10
    projection = blocks["network.attention.in_proj_weight"]
    assert projection.left.dtype == torch.float64
    assert torch.equal(projection.left, projection.left.transpose(1, 2))
    assert projection.left.shape == (1, 24, 24)
    assert projection.right.shape == (1, 9, 9)
    assert isinstance(trajectory.statistics, StatisticsFolder)


# Wide sides.


class LastWords(nn.Module):
    """An embedding of a vocabulary, and a head over it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.embedding(inputs).mean(1))


WIDE: dict[str, tuple[Made, Callable[[int], Tensor]]] = {
    "vocabulary": (LastWords, lambda n: torch.randint(VOCABULARY, (n, 5))),
    "inputs": (lambda: nn.Linear(VOCABULARY, 3), lambda n: torch.randn(n, VOCABULARY)),
}


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize("case", WIDE)
def test_no_matrix_of_a_vocabularys_width(
    case: str, fisher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "RANK", 32)
    make, inputs = WIDE[case]
    settings = {"fisher": fisher, "num_checkpoints": 1, "save_optimizer": False}
    dataset = data(inputs)
    with Largest() as seen:
        run(tmp_path, lambda: Model(make()), dataset, settings, max_steps=2)
        statistics = open_trajectory(tmp_path).merged_statistics(0, 2)
    assert seen.numel <= 200 * VOCABULARY  # the most are the bytes of the data's fingerprint
    if case == "inputs":
        assert statistics["network"].right.shape == (1, VOCABULARY + 1, 33)
        return
    assert statistics["network.embedding"].left.shape == (1, VOCABULARY)
    assert statistics["network.head"].left.shape == (1, VOCABULARY, 33)


def test_dense_sides_are_asked_for_and_limited_ones_approach_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broad() -> nn.Module:
        return nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 18))

    dataset = data(lambda n: torch.randn(n, 24), classes=18)

    def scores(name: str, dense_side: int | None) -> tuple[Tensor, torch.Size]:
        settings = {"curvature_dense_side": dense_side}
        module = run(tmp_path / name, lambda: Model(broad()), dataset, settings)
        trajectory = open_trajectory(tmp_path / name)
        estimator = Source(2, statistics="recorded")
        attribution = AttributionModule(module, trajectory, estimator, ClassificationTask())
        side = trajectory.merged_statistics(0, 10)["network.0"].left
        return attribution.attribute(dataset, dataset).values, side.shape

    exact, shape = scores("dense", None)
    assert shape == (1, 20, 20)
    errors = []
    for rank in (2, 16):
        monkeypatch.setattr(sides, "RANK", rank)
        found, shape = scores(str(rank), 0)
        assert shape == (1, 20, rank + 1)
        errors.append(relative(found, exact.double()))
    assert errors[0] > errors[1] > 0
    assert errors[1] < 0.05
    asked, shape = scores("asked", 30)
    assert shape == (1, 20, 20)
    assert torch.equal(asked, exact)


# What cannot be gathered is refused.


class Generic(nn.Module):
    """A weight that is used as its own square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight.square())


def huber(outputs: Tensor, target: Tensor) -> Tensor:
    return F.huber_loss(outputs[:, 0], target.to(outputs))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: Model(Generic()), r"Parameter network.weight .*cannot see.*curvature=None"),
        (lambda: Model(mlp(), huber), r"calls none of cross_entropy.*fisher='empirical'"),
        (
            lambda: Model(torch.compile(mlp(), backend="eager")),
            r"torch.compile hides in network\..*curvature=None",
        ),
        (lambda: Model(mlp(), lambda o, y: -F.cross_entropy(o, y)), r"subtracts a softmax loss"),
    ],
)
def test_what_cannot_be_gathered_is_refused(module: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((UnsupportedTrainingError, ValueError), match=message):
        run(tmp_path, module, data(vectors))


def test_other_losses_have_an_empirical_fisher(tmp_path: Path) -> None:
    run(tmp_path, lambda: Model(mlp(), huber), data(vectors), {"fisher": "empirical"})
    assert float(open_trajectory(tmp_path).merged_statistics(0, 10)["network.0"].examples) == 80


def test_an_inspection_shows_statistics_and_reads_them(tmp_path: Path) -> None:
    run(tmp_path, lambda: Model(mlp()), data(vectors))
    found = describe(tmp_path)
    assert not found.problems
    assert list(found.statistics) == list(open_trajectory(tmp_path).statistics)
    assert all(entry.name.endswith("2 blocks") for entry in found.statistics.values())
    sorted((tmp_path / "statistics").iterdir())[0].write_bytes(b"hello")
    assert len(describe(tmp_path).problems) == 1


def test_a_penalty_on_the_weights_is_no_hindrance(tmp_path: Path) -> None:
    class Penalised(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            penalty = sum(p.square().sum() for p in self.parameters())
            return super().training_step(batch, batch_idx) + 0.01 * penalty

    run(tmp_path, lambda: Penalised(mlp()), data(vectors))
    assert open_trajectory(tmp_path).merged_statistics(0, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature": "offline"}, "curvature must be one of None, 'online', got 'offline'"),
        ({"fisher": "real"}, "fisher must be one of 'true', 'empirical', got 'real'"),
        ({"curvature_dtype": "int8"}, "curvature_dtype must be one of 'float32', 'float64'"),
        (
            {"curvature": "online", "curvature_device": "gpu9"},
            "curvature_device must name",
        ),
        ({"curvature_every": 0}, "curvature_every must be at least 1, got 0"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TrajectoryRecorder(tmp_path, **settings)


# What attribution makes of it.


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.01)


@pytest.fixture(scope="module", params=["SGD", "AdamW"])
def recorded(request: Any, tmp_path_factory: Any) -> tuple[Model, Trajectory, TensorDataset]:
    """A longer run of a small classifier that learns something."""
    torch.manual_seed(0)
    inputs = torch.randn(200, 6)
    dataset = TensorDataset(inputs, (inputs @ torch.randn(6, 3)).argmax(1))
    path = tmp_path_factory.mktemp("online") / "run"
    network = lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))  # noqa: E731
    optimizer = adamw if request.param == "AdamW" else None
    module = run(path, lambda: Model(network(), optimizer=optimizer), dataset, {}, max_epochs=4)
    return module, open_trajectory(path), dataset


def scored(recorded: Any, estimator: Any, trajectory: Trajectory | None = None) -> Any:
    module, kept, dataset = recorded
    fresh = replace(trajectory or kept, curvature={})
    attribution = AttributionModule(module, fresh, estimator, ClassificationTask())
    queries = TensorDataset(*(part[:20] for part in dataset.tensors))
    with watched_walks() as titles:
        return attribution.attribute(dataset, queries), titles


@pytest.mark.parametrize("make", [Source, InfluenceFunction])
def test_recorded_statistics_agree_with_fitted_ones(recorded: Any, make: Any) -> None:
    plain = {"leading_directions": 0} if make is Source else {}
    fitted, _ = scored(recorded, make(statistics="fitted", **plain))
    for choice, least in (("auto", 0.9), ("corrected", 0.95)):
        found, titles = scored(recorded, make(statistics=choice))
        # "No further curvature pass": one for the corrected eigenvalues, at each checkpoint.
        fitting = {title for title in titles if "covariances" in title or "directions" in title}
        assert not fitting
        assert any("eigenvalues" in title for title in titles) == (choice == "corrected")
        pairs = torch.stack([found.values.flatten(), fitted.values.flatten()])
        assert torch.corrcoef(pairs)[0, 1] > least
        slope = (pairs[0] * pairs[1]).sum() / pairs[1].square().sum()
        assert 0.7 < slope < 1.4
        assert found.provenance["fisher"] == "true (in training)"
        assert found.provenance["statistics"]["examples"]
        assert found.provenance.get("leading_directions", 0) == 0
    assert "statistics" not in fitted.provenance


def test_other_curvature_is_fitted_as_ever(recorded: Any) -> None:
    for kind in ("diagonal", "identity", "exact"):
        one, _ = scored(recorded, InfluenceFunction(curvature=kind))
        other, _ = scored(recorded, InfluenceFunction(curvature=kind, statistics="fitted"))
        assert torch.equal(one.values, other.values)
    with pytest.raises(ValueError, match=r"Kronecker factors.*got curvature='exact'"):
        InfluenceFunction(curvature="exact", statistics="recorded")
    with pytest.raises(ValueError, match=r"statistics must be one of auto, recorded"):
        Source(statistics="online")
    assert scored(recorded, TracIn())[0].values.shape == (20, 200)


def test_missing_statistics_are_an_error(recorded: Any) -> None:
    trajectory = recorded[1]
    without = replace(trajectory, statistics={})
    with pytest.raises(ValueError, match=r"No curvature statistics were recorded.*'fitted'"):
        scored(recorded, Source(statistics="recorded"), without)
    scored(recorded, InfluenceFunction(), without)  # auto fits
    first = {(0, 16): trajectory.statistics[0, 16]}
    with pytest.raises(ValueError, match=r"in steps 33 to 66.*curvature_every"):
        scored(recorded, Source(), replace(trajectory, statistics=first))


def test_statistics_of_another_model_are_refused(recorded: Any) -> None:
    trajectory = recorded[1]
    changed = {
        interval: {f"other.{name}": block for name, block in found.items()}
        for interval, found in trajectory.statistics.items()
    }
    with pytest.raises(ValueError, match=r"do not fit the model.*network.0.weight.*got none"):
        scored(recorded, Source(), replace(trajectory, statistics=changed))


def test_a_skipped_step_leaves_no_statistics(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)  # overflows until it has shrunk
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    run(tmp_path, lambda: Model(mlp()), data(vectors), plugins=[precision])
    trajectory = open_trajectory(tmp_path)
    assert 0 < trajectory.num_steps < 10
    assert trajectory.facts.settings["skipped_steps"] == 10 - trajectory.num_steps
    taken = float(trajectory.merged_statistics(0, 10)["network.0"].examples)
    assert taken == len(trajectory.steps.examples)


def test_eigenvalues_of_few_samples_are_drawn_towards_their_mean() -> None:
    torch.manual_seed(0)
    width = 40
    roots = torch.logspace(0, -1, width, dtype=torch.float64)
    true = torch.diag(roots.square())
    for samples in (20, 80, 4000):
        rows = torch.randn(samples, width, dtype=torch.float64) * roots
        moment = (rows.T @ rows / samples)[None]
        values, vectors = torch.linalg.eigh(moment)
        own = shrunk(values, moment, float(samples))
        assert own.sum() == pytest.approx(float(values.sum()))
        rebuilt = vectors * own.unsqueeze(1) @ vectors.transpose(1, 2)
        before, after = (float((m[0] - true).norm()) for m in (moment, rebuilt))
        assert after < before
        # sklearn's OAS, written down independently: empirical (1 - rho) + rho mu.
        empirical, mu = moment[0], float(moment[0].trace()) / width
        alpha = float(empirical.square().mean())
        num = alpha + mu**2
        den = (samples + 1) * (alpha - mu**2 / width)
        rho = min(1.0, num / den)
        expected = (1 - rho) * empirical + rho * mu * torch.eye(width)
        assert torch.allclose(rebuilt[0], expected, rtol=0.05, atol=0.02)
