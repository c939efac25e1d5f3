"""Two processes of one trainer write the index that one process writes; of two that append, one is
refused."""

import warnings
from pathlib import Path

import pytest
import torch

from tda_lightning import AttributionModule
from tda_lightning.estimators import InfluenceFunction, Source
from tda_lightning.index import AttributionIndex
from tda_lightning.records.errors import TrajectoryLockedError
from tda_lightning.solvers import ConjugateGradients
from tda_lightning.store.lock import FolderLock
from tests.attributing import quiet
from tests.attribution.test_processes_scoring import MeanSquares, WithoutTask
from tests.index.test_attribution_index import build, run_of
from tests.processes import results
from tests.recording.test_processes import train
from tests.runs import Numbered

ESTIMATORS = {
    "source": Source(2),
    "solver": InfluenceFunction(damping=1.0, solver=ConjugateGradients("ekfac", tolerance=1e-8)),
}

OPTIONS = {"bytes_per_example": 1 << 12, "dtype": "float64", "shard": 4, "batch_size": 4}

pytestmark = pytest.mark.filterwarnings("ignore")


def made(root: Path, name: str, path: Path, trainer: object) -> AttributionIndex:
    task = MeanSquares() if name == "solver" else None
    attribution = AttributionModule(WithoutTask(), root / "run", ESTIMATORS[name], task)
    return AttributionIndex.build(attribution, Numbered(21), path, trainer=trainer, **OPTIONS)


def work(rank: int, root: Path, name: str) -> tuple:
    train(root / "run", {"module": WithoutTask})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = made(root, name, root / "together", quiet(strategy="ddp", devices=2))
    return index.missing(), index.damages(), index.facts  # the same in every process at once


@pytest.mark.parametrize("name", ["source", pytest.param("solver", marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [1 << 12, pytest.param(24, marks=pytest.mark.slow)])
def test_two_processes_build_what_one_does(tmp_path, name, size, monkeypatch):
    monkeypatch.setitem(OPTIONS, "bytes_per_example", size)
    first, second = results(work, tmp_path, name)
    assert first == second
    assert first[:2] == ([], [])
    alone = made(tmp_path, name, tmp_path / "alone", quiet())
    together = AttributionIndex.open(tmp_path / "together")
    assert alone.facts.width == together.facts.width
    if size == 24:  # chosen by a sample whose last digits differ: signs of directions may too
        return
    for own, other in zip(alone.shards(), together.shards(), strict=True):
        assert own.first == other.first
        codes, others = torch.from_numpy(own.codes), torch.from_numpy(other.codes)
        assert torch.allclose(codes, others, rtol=1e-6, atol=1e-7)


def test_one_process_appends_at_a_time(tmp_path):
    attribution, train_set, _ = run_of()
    index = build(attribution, train_set, tmp_path / "index")
    other = FolderLock(tmp_path / "index")
    other.acquire()
    try:
        with pytest.raises(TrajectoryLockedError, match="no other"):
            index.append(train_set)
    finally:
        other.release()
    assert AttributionIndex.open(tmp_path / "index").num_examples == 10
    index.append(train_set)
    assert index.num_examples == 20
