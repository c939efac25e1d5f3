"""Scores that cannot be right in size, and runs whose derivative says little."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import AttributionModule, Ensemble, Scores, TrajectoryRecorder
from tda_lightning.attribution.plausibility import beyond_range
from tda_lightning.cli.evaluation_table import evaluation_table, judge
from tda_lightning.estimators import (
    TRAK,
    FastInfluence,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.records.ground_truth import GroundTruth
from tda_lightning.report import write_report
from tests.runs import trainer


class Net(LightningModule):
    def __init__(self, rate: float, optimizer: Any = torch.optim.SGD) -> None:
        super().__init__()
        self.rate, self.optimizer = rate, optimizer
        self.net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.head = nn.Linear(24, 3)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), self.rate)


def data(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 6, generator=generator)
    labels = (inputs[:, :3] + torch.randn(size, 3, generator=generator)).argmax(1)
    return TensorDataset(inputs, labels)


TRAIN, QUERY = data(40, 0), data(8, 1)


def recorded(path: Path, rate: float, optimizer: Any = torch.optim.SGD, epochs: int = 6) -> Net:
    torch.manual_seed(0)
    module = Net(rate, optimizer)
    recorder = TrajectoryRecorder(path, num_checkpoints=3)
    trainer(recorder, max_epochs=epochs).fit(module, DataLoader(TRAIN, 8, shuffle=True))
    return module


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Net, Path]]:
    folder = tmp_path_factory.mktemp("runs")
    momentum = functools.partial(torch.optim.SGD, momentum=0.9)
    return {
        "smooth": (recorded(folder / "smooth", 0.05), folder / "smooth"),
        "adam": (recorded(folder / "adam", 2e-3, torch.optim.AdamW), folder / "adam"),
        "rough": (recorded(folder / "rough", 0.5, momentum, epochs=8), folder / "rough"),
    }


def scored(run: tuple[Net, Path], estimator: Any, **options: Any) -> Scores:
    module, path = run
    return AttributionModule(module, str(path), estimator).attribute(TRAIN, QUERY, **options)


ESTIMATORS = [TRAK(), TracIn(), InfluenceFunction(), FastInfluence(), Source(1), Unrolled()]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", ["smooth", "adam"])
def test_nothing_is_said_of_an_ordinary_run(name, estimator, runs) -> None:
    made = scored(runs[name], estimator).provenance
    assert "beyond_range" not in made
    assert not [n for n in made["notes"] if "cannot be right" in n or "rough" in n]
    least, most = made["measured_range"]
    assert least <= min(made["measurements"]) and most >= max(made["measurements"])


def test_sizes_are_said_to_be_predicted_or_not(runs) -> None:
    for estimator in ESTIMATORS:
        sizes = scored(runs["smooth"], estimator).provenance["sizes"]
        predicts = isinstance(estimator, Source | Unrolled)
        assert sizes.startswith("predicted" if predicts else "ranks only")


def test_exact_unrolling_of_a_rough_run_says_so(runs, tmp_path) -> None:
    scores = scored(runs["rough"], Unrolled())
    notes = scores.provenance["notes"]
    (note,) = [note for note in notes if "This run is rough" in note]
    assert "Ask `tda check`" in note
    # By itself the sign does not depend on the queries' number or on rounds.
    some = AttributionModule(runs["rough"][0], str(runs["rough"][1]), Unrolled())
    few = some.attribute(TRAIN, TensorDataset(*(t[:3] for t in QUERY.tensors)))
    assert any("This run is rough" in note for note in few.provenance["notes"])


class Huge(TracIn):
    """Scores a million times too large."""

    def score(self, session: Any) -> Any:
        add = session.add
        session.add = lambda segment, batch, values, *rest, **options: add(
            segment, batch, 1e6 * values, *rest, **options
        )
        return super().score(session)


@pytest.mark.parametrize("streamed", [False, True])
def test_scores_that_cannot_be_carry_a_warning(streamed, runs, tmp_path) -> None:
    options = {"scores_path": str(tmp_path / "scores.h5")} if streamed else {}
    scores = scored(runs["smooth"], Huge(), **options)
    made = scores.provenance
    least, most = made["measured_range"]
    beyond = made["beyond_range"]
    assert beyond["largest"] == pytest.approx(float(scores.values.abs().max()), rel=1e-5)
    assert beyond["count"] == int((scores.values.abs() > 100 * (most - least)).sum())
    (note,) = [note for note in made["notes"] if "cannot be right in size" in note]
    assert f"{beyond['count']} of 320 scores" in note
    page = tmp_path / "page.html"
    write_report(scores, page)
    assert "Impossible sizes" in page.read_text(encoding="utf-8")
    subsets = torch.rand(6, 40) < 0.5
    truth = GroundTruth(
        protocol="single_run",
        subsets=subsets,
        seeds=torch.zeros(6, 1, dtype=torch.int64),
        outcomes=torch.rand(6, 1, 8),
        done=torch.ones(6, 1, dtype=torch.bool),
        seconds=torch.zeros(6, 1),
        baseline=torch.rand(8),
        configuration={},
    )
    row = judge("huge", scores, truth)
    assert row.beyond == beyond["count"]
    names = [str(cell) for cell in evaluation_table([row]).columns[0].cells]
    assert names == ["huge (!)"]


def test_a_member_of_an_ensemble_carries_its_own_warning(runs) -> None:
    module, path = runs["smooth"]
    recorded(path.parent / "other", 0.1)
    ensemble = Ensemble([str(path), str(path.parent / "other")])
    scores = AttributionModule(module, ensemble, Huge()).attribute(TRAIN, QUERY)
    assert scores.provenance["beyond_range"]["count"] > 0
    assert any("cannot be right in size" in note for note in scores.provenance["notes"])


def test_what_has_no_score_or_no_range_is_passed_over() -> None:
    values = torch.tensor([[1.0, float("nan"), -9.0], [0.0, 5.0, 4.0]])
    found = beyond_range([values], {"measured_range": [0.0, 2.0]})
    assert found["beyond_range"] == {"largest": 9.0, "count": 2}
    assert beyond_range([values], {"measured_range": [0.0, 2.0], "sizes": "ranks only"}) == {}
    assert beyond_range([values], {"measured_range": [1.0, 1.0]}) == {}
    assert beyond_range([values], {}) == {}
    halves = beyond_range([values / 2, values / 2], {"measured_range": [0.0, 2.0]})
    assert halves == found
