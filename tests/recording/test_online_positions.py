"""curvature='online' of layers that are asked once for a whole batch, as positions are.

The oracle is plain autograd on every example alone: with the empirical Fisher and at most eight
examples the recorded trace is the sum of the examples' squared gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import InfluenceFunction, Source
from tda_lightning.records.curvature_statistics import BlockStatistics
from tda_lightning.records.errors import UnsupportedTrainingError
from tests.attributing import relative

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH, WIDTH = 4, 6


class Model(pl.LightningModule):
    """Words and positions; ``joined`` says how the hidden states come out of both."""

    def __init__(self, joined: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.joined = joined
        self.words, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double()

    def losses(self, batch: list[Tensor]) -> Tensor:
        hidden = self.joined(self, batch[0]).tanh()
        return F.cross_entropy(self.head(hidden.mean(1)), batch[1], reduction="none")

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        hidden = self.joined(self, batch[0]).tanh()
        return F.cross_entropy(self.head(hidden.mean(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def places(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1])


def added(m: nn.Module, tokens: Tensor) -> Tensor:
    return m.words(tokens) + m.places(places(tokens))


def first(m: nn.Module, tokens: Tensor) -> Tensor:
    return m.places(places(tokens)) + m.words(tokens)


def of_one(m: nn.Module, tokens: Tensor) -> Tensor:
    """As Hugging Face does it: numbers of shape [1, length]."""
    return m.words(tokens) + m.places(places(tokens)[None])


def unsqueezed(m: nn.Module, tokens: Tensor) -> Tensor:
    return torch.add(m.words(tokens), m.places(places(tokens)).unsqueeze(0))


def in_place(m: nn.Module, tokens: Tensor) -> Tensor:
    hidden = m.words(tokens).clone()
    hidden += m.places(places(tokens))
    return hidden


def coordinates(m: nn.Module, tokens: Tensor) -> Tensor:
    """A layer on the coordinates of positions."""
    return m.words(tokens) + m.places(places(tokens).double()[:, None])


def expanded(m: nn.Module, tokens: Tensor) -> Tensor:
    return m.words(tokens) + m.places(places(tokens).expand_as(tokens))


def twice(m: nn.Module, tokens: Tensor) -> Tensor:
    """The table is added in two places: each look-up is an output of its own."""
    hidden = (m.words(tokens) + m.places(places(tokens))).tanh()
    return hidden + m.places(places(tokens))


def scaled(m: nn.Module, tokens: Tensor) -> Tensor:
    return m.words(tokens) + 2 * m.places(places(tokens))


def multiplied(m: nn.Module, tokens: Tensor) -> Tensor:
    return m.words(tokens) * m.places(places(tokens))


def reused(m: nn.Module, tokens: Tensor) -> Tensor:
    """The one output is added, and used once more beside it."""
    table = m.places(places(tokens))
    return (m.words(tokens) + table).tanh() * table


def normed(m: nn.Module, tokens: Tensor) -> Tensor:
    return m.words(tokens) + F.layer_norm(m.places(places(tokens)), [WIDTH])


def table() -> nn.Module:
    return nn.Embedding(LENGTH, WIDTH)


GATHERED = {
    "added": lambda: Model(added, places=table()),
    "first": lambda: Model(first, places=table()),
    "of one": lambda: Model(of_one, places=table()),
    "unsqueezed": lambda: Model(unsqueezed, places=table()),
    "in place": lambda: Model(in_place, places=table()),
    "coordinates": lambda: Model(coordinates, places=nn.Linear(1, WIDTH)),
    "expanded": lambda: Model(expanded, places=table()),
    "twice": lambda: Model(twice, places=table()),
}
LEFT_OUT = {
    "scaled": lambda: Model(scaled, places=table()),
    "multiplied": lambda: Model(multiplied, places=table()),
    "reused": lambda: Model(reused, places=table()),
    "normed": lambda: Model(normed, places=table()),
}


def data(size: int) -> TensorDataset:
    torch.manual_seed(5)
    return TensorDataset(torch.randint(9, (size, LENGTH)), torch.randint(3, (size,)))


def record(model: Model, path: Path, batch: int, fisher: str, size: int | None = None) -> str:
    recorder = TrajectoryRecorder(
        str(path / "run"), num_checkpoints=1, curvature="online", curvature_every=1,
        fisher=fisher, curvature_dtype="float64",
    )  # fmt: skip
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[recorder],
    ).fit(model, DataLoader(data(size or batch), batch))  # fmt: skip
    return str(path / "run")


def statistics(run: str) -> dict[str, BlockStatistics]:
    trajectory = Trajectory.load(run)
    return dict(trajectory.merged_statistics(0, trajectory.last_step))


def traces(model: Model, size: int) -> dict[str, float]:
    """Sum of the examples' squared gradients by parameter."""
    names, values = zip(*model.named_parameters(), strict=True)
    totals = dict.fromkeys(names, 0.0)
    for n in range(size):
        single = [tensor[n : n + 1] for tensor in data(size).tensors]
        for name, gradient in zip(
            names, torch.autograd.grad(model.losses(single).sum(), values), strict=True
        ):
            totals[name] += float(gradient.square().sum())
    return totals


@pytest.mark.parametrize(
    ("kind", "batch"),
    [*((k, LENGTH) for k in GATHERED), ("added", 2 * LENGTH), ("of one", 2), ("twice", 5)],
)
def test_what_is_broadcast_by_a_sum_is_each_examples(kind: str, batch: int, tmp_path: Path) -> None:
    """A batch as long as a sequence, or whose sequences are multiples of it, too."""
    truth = traces(GATHERED[kind](), batch)
    found = statistics(record(GATHERED[kind](), tmp_path, batch, "empirical"))
    for block in found.values():
        expected = sum(truth[name] for name in block.parameters)
        assert float(block.trace) == pytest.approx(expected, rel=1e-9), block.parameters


@pytest.mark.parametrize(
    ("kind", "fisher", "batch"),
    [*((k, "empirical", LENGTH) for k in LEFT_OUT), ("scaled", "true", 5), ("reused", "true", 5)],
)
def test_what_cannot_be_told_apart_is_left_to_be_fitted(
    kind: str, fisher: str, batch: int, tmp_path: Path
) -> None:
    truth = traces(LEFT_OUT[kind](), batch)
    with pytest.warns(UserWarning, match="No curvature statistics of places are gathered"):
        run = record(LEFT_OUT[kind](), tmp_path, batch, fisher)
    found = statistics(run)
    assert float(found["places"].examples) == 0
    if fisher == "empirical":
        for name in ("words", "head"):
            expected = sum(truth[parameter] for parameter in found[name].parameters)
            assert float(found[name].trace) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_a_first_batch_of_one_shows_nothing_yet(fisher: str, tmp_path: Path) -> None:
    """Of one example every row is its own; the next batch tells."""
    model = LEFT_OUT["scaled"]()
    recorder = TrajectoryRecorder(
        str(tmp_path / "run"), num_checkpoints=1, curvature="online", curvature_every=1,
        fisher=fisher,
    )  # fmt: skip
    loader = DataLoader(data(9), batch_sampler=[[0], [1, 2, 3, 4], [5, 6, 7, 8]])
    with pytest.warns(UserWarning, match="No curvature statistics of places are gathered"):
        pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[recorder],
        ).fit(model, loader)  # fmt: skip
    found = statistics(str(tmp_path / "run"))
    assert float(found["words"].examples) == 9
    assert float(found["places"].examples) <= 1


@pytest.mark.parametrize("estimator", [InfluenceFunction(), Source(num_segments=1)])
def test_the_rest_is_fitted_afterwards_and_the_provenance_says_so(
    estimator, tmp_path: Path
) -> None:
    model = LEFT_OUT["scaled"]()
    run = record(model, tmp_path, 8, "true", size=24)
    scores = AttributionModule(model, run, estimator).attribute(data(24), data(3), batch_size=8)
    assert scores.provenance["statistics"]["fitted"] == ["places"]
    fitted = AttributionModule(
        model,
        run,
        type(estimator)(
            statistics="fitted", **({"num_segments": 1} if isinstance(estimator, Source) else {})
        ),
    )
    other = fitted.attribute(data(24), data(3), batch_size=8)
    assert relative(scores.values, other.values) < 0.5  # curvature of other steps and labels
    assert "statistics" not in other.provenance


def test_a_positions_block_needs_no_pass_over_the_data(tmp_path: Path) -> None:
    model = GATHERED["added"]()
    run = record(model, tmp_path, 8, "true", size=24)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(workers|deprecated|num_training).*")
        scores = AttributionModule(model, run, InfluenceFunction()).attribute(data(24), data(3))
    assert "fitted" not in scores.provenance["statistics"]


def test_a_hook_that_holds_entries_is_refused(tmp_path: Path) -> None:
    model = GATHERED["added"]()
    model.head.weight.register_hook(lambda g: g * torch.tensor([[0.0], [1.0], [1.0]]))
    with pytest.raises(UnsupportedTrainingError, match="holds some entries of head.weight"):
        record(model, tmp_path, 4, "true")
