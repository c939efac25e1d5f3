"""Training with weights, against the replay of the equal run with weights and a loop by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import TracIn, Unrolled
from tda_lightning.evaluation import landing_error, measure, retrain
from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.reweighting import (
    WeightedTraining,
    load_weights,
    predicted_change,
    save_weights,
    weights_from_scores,
)
from tests.attributing import quiet
from tests.processes import results

COUNT, BATCH = 20, 6
torch.set_num_threads(1)


class Net(LightningModule):
    """Dropout, a penalty that belongs to no example, and a dictionary for a result."""

    def __init__(self, class_weights: bool = False, dropout: float = 0.2) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)
        ).double()
        self.own = torch.tensor([1.0, 2.0, 0.5]).double() if class_weights else None

    def training_step(self, batch: Any) -> Any:
        inputs, labels = batch
        penalty = 0.01 * sum(p.square().sum() for p in self.parameters())
        loss = F.cross_entropy(self.net(inputs), labels, weight=self.own) + penalty
        self.log("loss", loss)
        return {"loss": loss, "extra": 1}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Contrastive(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def training_step(self, batch: Any, _: int) -> Tensor:
        found = self.layer(batch[0])
        return torch.logsumexp((found @ found.T).flatten(), 0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data() -> TensorDataset:
    own = torch.Generator().manual_seed(0)
    inputs = torch.randn(COUNT, 3, generator=own, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(3, (COUNT,), generator=own))


def weights() -> Tensor:
    drawn = 2 * torch.rand(COUNT, generator=torch.Generator().manual_seed(1)).double()
    drawn[[2, 5]] = 0
    return drawn


def train(*callbacks: Any, module: Any = None, **options: Any) -> Any:
    seed_everything(0, verbose=False)
    module = module or Net()
    loader = DataLoader(
        data(), batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    quiet(max_epochs=3, callbacks=list(callbacks), **options).fit(module, loader)
    return module


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def require_equal(found: Any, expected: Any) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("class_weights", "accumulate"), [(False, 1), (True, 2)])
def test_a_weighted_loss_is_the_replay_with_weights(
    class_weights: bool, accumulate: int, tmp_path: Any
) -> None:
    options = {"accumulate_grad_batches": accumulate}
    seed_everything(0, verbose=False)
    recorder = TrajectoryRecorder(tmp_path / "equal")
    plain = train(recorder, module=Net(class_weights), **options)
    trajectory = Trajectory.load(tmp_path / "equal")
    expected = retrain(trajectory, Net(class_weights), None, data(), weights())
    seed_everything(0, verbose=False)
    module = Net(class_weights)
    found = state(train(WeightedTraining(weights()), module=module, **options))
    require_equal(found, {name: expected[name] for name in found})
    moved = [float((found[n] - value).abs().max()) for n, value in state(plain).items()]
    assert max(moved) > 0.01
    assert "training_step" not in vars(module)  # the class's own again


def test_weights_of_one_change_nothing() -> None:
    seed_everything(0, verbose=False)
    plain = train(module=Net())
    seed_everything(0, verbose=False)
    found = train(WeightedTraining(torch.ones(COUNT)), module=Net())
    require_equal(state(found), state(plain))


def test_by_hand() -> None:
    seed_everything(0, verbose=False)
    module = Net(dropout=0.0)
    start = {name: value.detach().clone() for name, value in module.state_dict().items()}
    found = state(train(WeightedTraining(weights()), module=module))
    by_hand = Net(dropout=0.0)
    by_hand.load_state_dict(start)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.05)
    order = torch.Generator().manual_seed(3)
    inputs, labels = data().tensors
    own = weights()
    for _ in range(3):
        loader = DataLoader(range(COUNT), batch_size=BATCH, shuffle=True, generator=order)  # type: ignore[arg-type]
        for batch in loader:
            each = F.cross_entropy(by_hand.net(inputs[batch]), labels[batch], reduction="none")
            penalty = 0.01 * sum(p.square().sum() for p in by_hand.parameters())
            optimizer.zero_grad()
            ((own[batch] * each).mean() + penalty).backward()
            optimizer.step()
    require_equal(found, state(by_hand))


def test_a_recorder_writes_the_weights_down(tmp_path: Any) -> None:
    callbacks = [TrajectoryRecorder(tmp_path / "run"), WeightedTraining(weights())]
    module = train(*callbacks)
    trajectory = Trajectory.load(tmp_path / "run")
    assert torch.equal(trajectory.data_weights, weights())
    ones = torch.ones(COUNT)
    landed = retrain(trajectory, Net(), None, data(), ones)
    assert landing_error(trajectory, landed) < 1e-9
    require_equal(landed, state(module))
    queries = TensorDataset(*data()[:3])
    scores = AttributionModule(Net(), trajectory, TracIn()).attribute(data(), queries)
    assert bool(scores.values.isfinite().all())


def test_the_sampler_draws_by_weight(tmp_path: Any) -> None:
    for order in (0, 1):  # whichever of the callbacks comes first
        callbacks: list[Any] = [
            TrajectoryRecorder(tmp_path / str(order)),
            WeightedTraining(weights(), by="sampler", seed=4),
        ]
        train(*(callbacks if order else reversed(callbacks)))
        trajectory = Trajectory.load(tmp_path / str(order))
        drawn = trajectory.steps.examples
        expected = torch.multinomial(
            weights(), COUNT, True, generator=torch.Generator().manual_seed(4)
        )
        assert torch.equal(drawn[:COUNT], expected)
        assert len(drawn) == 3 * COUNT and not bool(((drawn == 2) | (drawn == 5)).any())
        assert trajectory.data_weights is None
        loader = DataLoader(data(), batch_size=BATCH, shuffle=True)
        before = loader.batch_sampler.sampler
        quiet(max_epochs=1, callbacks=[callbacks[1]]).fit(Net(), loader)
        assert loader.batch_sampler.sampler is before


def in_two_processes(rank: int, folder: Any) -> Any:
    """The equal run, the weighted one, and what the sampler drew."""
    together = {"strategy": "ddp", "devices": 2}
    start = train(TrajectoryRecorder(folder / "equal"), module=Net(dropout=0.0), **together)
    found = train(WeightedTraining(weights()), module=Net(dropout=0.0), **together)
    before, after = state(start), state(found)
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 0.01
    drawing = [WeightedTraining(weights(), by="sampler", seed=4)]
    train(TrajectoryRecorder(folder / "drawn"), *drawing, **together)
    return state(found)


def test_two_processes(tmp_path: Any) -> None:
    seed_everything(0, verbose=False)
    first, second = results(in_two_processes, tmp_path)
    trajectory = Trajectory.load(tmp_path / "equal")
    expected = retrain(trajectory, Net(dropout=0.0), None, data(), weights())
    require_equal(first, {name: expected[name] for name in first})
    require_equal(second, first)
    drawn = Trajectory.load(tmp_path / "drawn").steps.examples.view(-1, COUNT // 2)
    own = torch.multinomial(weights(), COUNT, True, generator=torch.Generator().manual_seed(4))
    halves = [own[rank::2] for rank in (0, 1)]  # each rank's batches: 6 and 4
    steps = [torch.cat([half[part] for half in halves]) for part in (slice(6), slice(6, 10))]
    assert sorted(drawn.flatten()[:12].tolist()) == sorted(steps[0].tolist())
    assert sorted(drawn.flatten()[12:20].tolist()) == sorted(steps[1].tolist())


def test_a_strategy_that_shares_the_model_out_is_refused() -> None:
    trainer = SimpleNamespace(world_size=2, global_rank=0, strategy=FSDPStrategy())
    with pytest.raises(UnsupportedTrainingError, match="FSDPStrategy shares it out. Use strategy"):
        WeightedTraining(weights()).setup(trainer, Net(), "fit")  # type: ignore[arg-type]


@pytest.mark.slow  # five trainings and an exact unrolling
def test_the_predicted_change_is_the_derivative_of_training(tmp_path: Any) -> None:
    train(TrajectoryRecorder(tmp_path / "run"), module=Net(dropout=0.0))
    trajectory, queries = Trajectory.load(tmp_path / "run"), TensorDataset(*data()[:4])
    attribution = AttributionModule(Net(dropout=0.0), trajectory, Unrolled())
    scores = attribution.attribute(data(), queries).values
    weights = weights_from_scores(scores, rate=0.5)
    step = weights - 1

    def measured(size: float) -> Tensor:
        changed = retrain(trajectory, Net(dropout=0.0), None, data(), 1 + size * step)
        return measure(Net(dropout=0.0), None, changed, queries)

    near = (measured(1e-5) - measured(-1e-5)) / 2e-5
    far = (measured(2e-5) - measured(-2e-5)) / 4e-5
    expected = (4 * near - far) / 3
    torch.testing.assert_close(predicted_change(scores, weights), expected, rtol=1e-7, atol=1e-10)
    assert float(expected.mean()) < 0


def test_weights_as_a_file(tmp_path: Any) -> None:
    save_weights(weights(), tmp_path / "w.csv")
    assert torch.equal(load_weights(tmp_path / "w.csv"), weights())
    for text in ("", "index,weight\n1,2.0\n", "index,weight\n0,heavy\n", "weight\n1\n"):
        (tmp_path / "x.csv").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="expected the header index,weight"):
            load_weights(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("index,weight\n0,-1.0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="negative"):
        load_weights(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError, match="tda reweight"):
        load_weights(tmp_path / "y.csv")


def test_what_cannot_be_weighted() -> None:
    with pytest.raises(ValueError, match="weights are negative"):
        WeightedTraining(-weights())
    with pytest.raises(ValueError, match="All 20 weights are 0"):
        WeightedTraining(0 * weights())
    with pytest.raises(ValueError, match="by must be one of loss, sampler, got 'all'"):
        WeightedTraining(weights(), by="all")  # type: ignore[arg-type]
    for by in ("loss", "sampler"):
        with pytest.raises(ValueError, match="one number for each of 20 training examples"):
            train(WeightedTraining(torch.ones(7), by=by))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedTrainingError, match="depend on one another"):
        train(WeightedTraining(weights()), module=Contrastive())
    module = Net()
    with pytest.raises(UnsupportedTrainingError, match="with a batch size"):
        quiet(max_epochs=1, callbacks=[WeightedTraining(weights(), by="sampler")]).fit(
            module, DataLoader(data(), batch_size=None)
        )
    assert "training_step" not in vars(module)
