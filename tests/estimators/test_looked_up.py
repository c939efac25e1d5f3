"""Embeddings cost in proportion to the rows that are looked up: the same scores as with gradients
as high as the weight, and no tensor of that height for each example or query."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tda_lightning.estimators import InfluenceFunction, Source, TracIn, pairs, queries
from tda_lightning.estimators.source import estimator, looked_up, segments
from tda_lightning.gradients import Dense
from tda_lightning.gradients.rows import Rows, touched_rows
from tda_lightning.session import queries as session_queries
from tda_lightning.session.stage import Stage
from tests.attributing import attribute, relative
from tests.cases import Case
from tests.cases.training import OPTIMIZERS, train
from tests.largest import Largest
from tests.quick import quick
from tests.two_stages import two_stages
from tests.unrolling import NETWORKS, Network, sgd
from tests.unrolling import OPTIMIZERS as UNROLLED

CHECKPOINTS = (2, 3, 5, 6)
HEIGHT = 5003


def case(height: int) -> Case:
    def inputs(count: int) -> Tensor:
        return torch.randint(0, 12, (count, 4)) * (height // 13)

    layers = (nn.Embedding(height, 3), nn.Flatten(), nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 2))
    return Case("looked up", lambda: nn.Sequential(*layers), inputs, kind="classification")


ESTIMATORS = {
    "tracin": TracIn(),
    "ekfac": InfluenceFunction(),
    "kfac": InfluenceFunction(curvature="kfac"),
    "diagonal": InfluenceFunction(curvature="diagonal"),
    "source": Source(num_segments=2, leading_directions=0),
    # More directions than the sample's gradients have: the iteration finds them all.
    "leading": Source(num_segments=2, leading_directions=30),
    "recursion": Source(num_segments=2, leading_directions=0, momentum="recursion"),
    "recorded": Source(num_segments=2, leading_directions=0, order="recorded"),
}
RUNS = [(name, "momentum") for name in ESTIMATORS] + [
    (name, "adamw") for name in ("tracin", "source", "leading", "recorded")
]


@contextmanager
def as_high_as_the_weight() -> Iterator[None]:
    """Without what this is about: every query and example takes all rows."""

    class Never:
        pass

    with pytest.MonkeyPatch.context() as patch:
        for module in (queries, pairs, session_queries):
            patch.setattr(module, "Rows", Never)
        patch.setattr(estimator, "separable", lambda *_: [])
        patch.setattr(segments, "touched_rows", lambda _: {})
        yield


@pytest.mark.parametrize(("name", "optimizer"), RUNS)
def test_scores_are_those_of_all_rows(name: str, optimizer: str) -> None:
    small = case(41)
    run, module, data = train(small, OPTIMIZERS[optimizer], checkpoints=CHECKPOINTS)
    scores = attribute(small, run, module, data, ESTIMATORS[name])
    run.curvature.clear()
    with as_high_as_the_weight():
        expected = attribute(small, run, module, data, ESTIMATORS[name])
    assert relative(scores.values, expected.values) < 1e-9
    if expected.self_influence is not None:
        assert relative(scores.self_influence, expected.self_influence) < 1e-9


@pytest.mark.parametrize("name", ["tracin", "ekfac", "source", "leading", "recorded"])
def test_nothing_is_as_high_as_the_weight_for_each_example(name: str) -> None:
    """One embedding is 3 x 5003 numbers; three queries, twice that with momentum's state, or eight
    examples would be as many times. What SOURCE does to adjoints has one component, or with the
    state two by two."""
    wide = case(HEIGHT)
    run, module, data = train(wide, OPTIMIZERS["sgd"], checkpoints=CHECKPOINTS)
    with Largest() as seen:
        attribute(wide, run, module, data, ESTIMATORS[name], batch_size=8)
    assert seen.scalars <= (4 if name == "recorded" else 2) * 3 * HEIGHT


def test_pairs_meet_in_the_same_row() -> None:
    torch.manual_seed(0)
    some, others = (
        Rows(
            torch.randint(size, (30,)),
            torch.randint(9, (30,)),
            torch.randn(30, 4).double(),
            size,
            9,
        )
        for size in (5, 6)
    )
    dense, other = (rows.dense(slice(None)) for rows in (some, others))
    expected = torch.einsum("bgij,qgij->qb", dense, other)
    torch.testing.assert_close(some.pairs(others), expected)
    torch.testing.assert_close(others.met_by(some), expected)
    stacked = Rows.stacked([some, others])
    torch.testing.assert_close(stacked.dense(slice(None)), torch.cat([dense, other]))
    (found,) = touched_rows([{"a": some}, {"a": others}]).values()
    assert found.equal(torch.cat([some.index, others.index]).unique())


def test_queries_may_come_in_other_forms() -> None:
    """A batch in which an embedding was differentiated example by example is put in rows too."""
    rows = Rows(torch.tensor([0, 2]), torch.tensor([3, 1]), torch.randn(2, 4).double(), 3, 5)
    again = Rows.of(Dense(rows.dense(slice(None))))
    torch.testing.assert_close(again.dense(slice(None)), rows.dense(slice(None)))
    dense = Dense(torch.randn(6, 1, 5, 4).double())
    expected = torch.einsum("qgij,bgij->qb", rows.dense(slice(None)), dense.values)
    torch.testing.assert_close(rows.met_by(dense), expected)


def _network(height: int) -> Network:
    def build() -> nn.Module:
        layers = (nn.Flatten(), nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 3))
        return nn.Sequential(nn.Embedding(height, 3), *layers)

    def inputs(count: int) -> Tensor:
        return torch.randint(0, 12, (count, 4)) * (height // 13)

    return dataclasses.replace(NETWORKS["batch norm"], build=build, inputs=inputs)


STAGED = {
    "source": Source(num_segments=2, leading_directions=0),
    "leading": Source(num_segments=2, leading_directions=30),
    "recorded": Source(num_segments=2, leading_directions=0, order="recorded"),
}


@pytest.mark.parametrize("frozen", [(), ("0",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", quick(STAGED, ["leading"]))
def test_stages_follow_the_rows_in_use(
    name: str, frozen: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one stage a table is trained, in the next one it is trained further or only used."""
    work = two_stages(
        tmp_path, (_network(41), _network(41)), (sgd(momentum=0.8), UNROLLED["adamw"]), frozen
    )
    heights: list[int] = []
    narrow = looked_up.without_unused_rows

    def watched(stages: Sequence[Stage]) -> list[Stage]:
        found = narrow(stages)
        heights.extend(block.shape[1] for block in found[0].wide.blocks if block.name == "net.0")
        return found

    monkeypatch.setattr(estimator, "without_unused_rows", watched)
    expected = work.scores(STAGED[name])
    monkeypatch.setattr(looked_up, "WIDE", 1)
    for run in work.runs:
        run.curvature.clear()
    scores = work.scores(STAGED[name])
    assert heights == [41, 12]
    assert expected.values[:, :10].any() and expected.values[:, 10:].any()
    assert relative(scores.by_segment, expected.by_segment) < 1e-9
