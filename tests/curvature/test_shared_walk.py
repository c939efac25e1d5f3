"""One walk gives the gradients for blocks and for leading directions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tda_lightning.curvature.shared_walk import Drawn, SampledOrder, SharedWalk
from tda_lightning.estimators import Source
from tda_lightning.estimators.source import estimator
from tests import oracles
from tests.attributing import attribute, relative
from tests.cases.training import OPTIMIZERS
from tests.sampled import CASES


@pytest.mark.parametrize("count", [10, 40, 100])
def test_samples_are_batches_of_all_examples(count: int) -> None:
    order = SampledOrder.of(count, 16, 5, 30, torch.Generator().manual_seed(1))
    assert sorted(n for batch in order.batches for n in batch) == list(range(count))
    fitted = [n for number in order.fitted for n in order.batches[number]]
    if count < 20:
        assert order.tested is None and fitted == list(range(count))
        return
    assert order.tested is not None
    tested = [n for number in order.tested for n in order.batches[number]]
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert set(fitted) == set(drawn[:16].tolist())
    assert set(tested) == set(drawn.roll(-16)[:16].tolist())
    assert len(fitted) == len(tested) == 16


@pytest.mark.parametrize(
    ("name", "optimizer", "kind"),
    [
        ("convolutions", "sgd", "ekfac"),
        ("sequence", "adam", "ekfac"),  # whose metric scales what the walk leaves
        pytest.param("regression", "momentum", "kfac", marks=pytest.mark.slow),
        pytest.param("classification", "sgd", "diagonal", marks=pytest.mark.slow),
    ],
)
def test_directions_of_the_blocks_walk_are_those_of_their_own(
    name, optimizer, kind, monkeypatch
) -> None:
    case = CASES[name]
    module, data = case.build(), case.batch(90, 0)
    batches = oracles.cut_batches(90, 30, epochs=1)
    run = oracles.record_run(module, case.loss, data, OPTIMIZERS[optimizer], batches, (1, 2, 3))
    found = []
    for shared in (estimator.shared_walk, lambda *_: None):
        monkeypatch.setattr(estimator, "shared_walk", shared)
        run.curvature.clear()
        own = Source(1, leading_directions=6, curvature=kind)
        found.append(attribute(case, run, module, data, own, batch_size=8).by_segment)
    assert relative(*found) < 1e-9


def test_a_walk_that_left_too_little_is_an_error(monkeypatch) -> None:
    case = CASES["regression"]
    module, data = case.build(), case.batch(90, 0)
    batches = oracles.cut_batches(90, 30, epochs=1)
    run = oracles.record_run(module, case.loss, data, OPTIMIZERS["sgd"], batches, (1, 2, 3))
    keep = SharedWalk.keep

    def keep_most(walk: SharedWalk, step: int, number: int, drawn: Sequence[Drawn]) -> None:
        if number != 1:
            keep(walk, step, number, drawn)

    monkeypatch.setattr(SharedWalk, "keep", keep_most)
    with pytest.raises(RuntimeError, match=r"no gradients for the batches \[1\] of"):
        attribute(case, run, module, data, Source(1, leading_directions=6), batch_size=8)
