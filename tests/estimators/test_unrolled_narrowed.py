"""Exact unrolling of wide embeddings follows the rows that are looked up alone: the same scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.estimators.unrolled import estimator, narrowed, resume
from tda_lightning.estimators.unrolled.round_scores import RoundScores
from tests import oracles
from tests.attributing import relative
from tests.cases import Case
from tests.cases.case import Function
from tests.cases.training import queries_of
from tests.largest import Largest
from tests.two_stages import two_stages
from tests.unrolling import EXACT, NETWORKS, OPTIMIZERS, in_memory, sgd, unroll

pytestmark = pytest.mark.filterwarnings("ignore")

HEIGHT = 41


def case(height: int, **options: Any) -> Case:
    def inputs(count: int) -> Tensor:
        return torch.randint(0, 12, (count, 4)) * (height // 13)

    def build() -> nn.Module:
        layers = (nn.Flatten(), nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 2))
        return nn.Sequential(nn.Embedding(height, 3, **options), *layers)

    return Case("wide", build, inputs, kind="classification")


@contextmanager
def heights() -> Iterator[list[dict[str, int]]]:
    """How many rows the tables have that are narrow, of each attribution."""
    found = []

    @contextmanager
    def watched(runs: Any) -> Iterator[Any]:
        with narrowed.narrowed(runs) as (stages, rows):
            found.append({name: len(own) for name, own in rows.items()})
            for name, own in rows.items():
                weight = stages[-1].session.module.get_parameter(name)
                assert len(weight) == len(own)
            yield stages, rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrowed, "WIDE", 1)
        patch.setattr(estimator, "narrowed", watched)
        yield found


def expected_of(own: Case, run: Any, module: nn.Module, data: Any) -> Tensor:
    return oracles.removals(run, module, own.loss, data, own.loss, queries_of(own))


@pytest.mark.parametrize(
    ("name", "options", "run_options"),
    [
        ("momentum and decay", {"padding_idx": -5}, {"clip_norm": 0.1}),
        ("adamw", {}, {}),
        pytest.param("rmsprop, everything", {}, {"clip_value": 0.01}, marks=pytest.mark.slow),
    ],
)
def test_scores_are_the_derivative(name: str, options: Any, run_options: Any) -> None:
    wide = case(HEIGHT, **options)
    run, module, data = in_memory(wide, OPTIMIZERS[name], **run_options)
    weight = module[0].weight
    with heights() as found:
        scores = unroll(wide, run, module, data)
    expected = expected_of(wide, run, module, data)
    assert relative(scores.by_segment, expected) < EXACT
    assert found == [{"0.weight": 12 + ("padding_idx" in options)}]
    assert module[0].weight is weight and module[0].padding_idx == (
        HEIGHT - 5 if "padding_idx" in options else None
    )
    assert not module[0]._forward_pre_hooks
    assert scores.provenance["certificate"]["relative_difference"] < 1e-12


def _tied(module: Any, inputs: Tensor) -> Tensor:
    return module.head(F.linear(module.table(inputs).mean(1), module.table.weight))


def _looked_up_by_hand(module: Any, inputs: Tensor) -> Tensor:
    return module.head(
        module.table(inputs).mean(1) + F.embedding(inputs[:, 0], module.table.weight)
    )


@pytest.mark.parametrize("use", [_tied, _looked_up_by_hand])
def test_a_table_that_is_used_otherwise_has_all_rows(use: Any) -> None:
    def build() -> nn.Module:
        head = nn.Linear(HEIGHT if use is _tied else 3, 2)
        return Function(use, table=nn.Embedding(HEIGHT, 3), head=head)

    wide = dataclasses.replace(case(HEIGHT), factory=build)
    run, module, data = in_memory(wide, OPTIMIZERS["sgd"])
    with heights() as found:
        scores = unroll(wide, run, module, data)
    assert relative(scores.by_segment, expected_of(wide, run, module, data)) < EXACT
    assert found == [{}]


def _drawn(module: Any, inputs: Tensor) -> Tensor:
    """Some words are others in training."""
    if module.training:
        other = torch.randint(HEIGHT // 3, inputs.shape)
        inputs = torch.where(torch.rand(inputs.shape) < 0.3, other, inputs)
    return module.head(module.table(inputs).flatten(1).tanh())


@pytest.mark.parametrize(
    "frozen", [pytest.param((), marks=pytest.mark.slow), ("table",)], ids=["trained", "frozen"]
)
def test_drawn_rows_and_stages(frozen: tuple[str, ...], tmp_path: Path) -> None:
    def build() -> nn.Module:
        return Function(_drawn, table=nn.Embedding(HEIGHT, 3), head=nn.Linear(12, 3))

    network = dataclasses.replace(
        NETWORKS["batch norm"], build=build, inputs=lambda n: torch.randint(0, 9, (n, 4)) * 4
    )
    work = two_stages(tmp_path, (network, network), (OPTIMIZERS["adamw"], sgd()), frozen)
    with heights() as found:
        scores = work.scores(estimator.Unrolled())
    first, second = work.expected()
    assert relative(scores.by_segment[: len(first), :, :10], first) < EXACT
    assert relative(scores.by_segment[len(first) :, :, 10:], second) < EXACT
    assert 9 < found[0]["net.table.weight"] < 0.5 * HEIGHT


def test_broken_off_work_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_SECONDS", 0.0)
    wide = case(HEIGHT)
    run, module, data = in_memory(wide, OPTIMIZERS["adamw"])
    weight, add = module[0].weight, RoundScores.add
    with heights() as found:
        expected = unroll(wide, run, module, data)

        def stop_after_one(scores: RoundScores, number: int, segment: int, values: Tensor) -> None:
            if segment == 1:
                raise OSError("broken off")
            add(scores, number, segment, values)

        with monkeypatch.context() as patch:
            patch.setattr(RoundScores, "add", stop_after_one)
            with pytest.raises(OSError, match="broken off"):
                unroll(wide, run, module, data)
        assert module[0].weight is weight and run.unfinished
        again = unroll(wide, run, module, data)
    assert torch.equal(again.by_segment, expected.by_segment)
    assert not run.unfinished and found == 3 * [{"0.weight": 12}]


def test_nothing_is_as_high_as_the_table_for_each_query() -> None:
    height = 5003
    wide = case(height)
    run, module, data = in_memory(wide, OPTIMIZERS["adamw"])
    with heights(), Largest() as seen:
        unroll(wide, run, module, data)
    assert seen.scalars <= 3 * height
