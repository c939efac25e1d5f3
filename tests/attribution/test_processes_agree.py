"""What two processes find together is what one finds: parts that few settings use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.curvature import fit
from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.tasks import LanguageModelingTask
from tests.attributing import CaseTask, quiet, relative
from tests.cases.training import MLP
from tests.estimators.test_by_token import recorded, texts
from tests.processes import results
from tests.unrolling import OPTIMIZERS, in_memory, sgd

pytestmark = pytest.mark.filterwarnings("ignore")

TOGETHER = {"devices": 2, "strategy": "ddp"}
BY_TOKEN = {"tracin": TracIn(), "source": Source(2), "recorded": Source(2, order="recorded")}


def in_directions(trainer: Any) -> Any:
    """Exact unrolling of 60 queries of a model with 20 weights."""
    run, module, data = in_memory(MLP, OPTIMIZERS["momentum and decay"])
    queries = TensorDataset(*MLP.batch(60, seed=7))
    attribution = AttributionModule(module, run, Unrolled(query_tolerance=1e-6), CaseTask(MLP.kind))
    found = attribution.attribute(TensorDataset(*data), queries, 4, trainer)
    return found.values, found.provenance["directions"]


def by_token(trainer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    run, module, data = recorded(sgd(momentum=0.5))
    found = {}
    for name, estimator in BY_TOKEN.items():
        run.curvature.clear()
        attribution = AttributionModule(module, run, estimator, LanguageModelingTask())
        scores = attribution.attribute(
            TensorDataset(*data),
            TensorDataset(*texts(3, seed=7)),
            3,
            trainer,
            self_influence=False,
            by_token="both",
        )
        assert scores.by_token is not None and scores.by_query_token is not None
        found[name] = scores.by_token, scores.by_query_token
    return found


def by_kept_gradients(trainer: Any) -> Tensor:
    """EK-FAC, whose second walk goes over gradients that the first one kept, if there is room."""
    run, module, data = in_memory(MLP, OPTIMIZERS["sgd"])
    attribution = AttributionModule(module, run, InfluenceFunction(), CaseTask(MLP.kind))
    queries = TensorDataset(*MLP.batch(3, seed=7))
    return attribution.attribute(TensorDataset(*data), queries, 4, trainer).values


def in_each(rank: int) -> tuple[Any, Any, Tensor, Tensor]:
    directions, tokens = in_directions(quiet(**TOGETHER)), by_token(quiet(**TOGETHER))
    kept = by_kept_gradients(quiet(**TOGETHER))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(fit, "memory_budget", lambda: 0)
        without_room = by_kept_gradients(quiet(**TOGETHER))
    return directions, tokens, kept, without_room


@pytest.mark.slow
def test_two_processes_agree_with_one() -> None:
    exact, whole = in_directions(quiet())
    tokens, kept = by_token(quiet()), by_kept_gradients(quiet())
    for (values, record), own_tokens, own_kept, without_room in results(in_each):
        assert relative(values, exact) < 1e-6  # each truncates the gradients of its own queries
        assert record["queries"] == whole["queries"] == 60
        assert whole["kept"] <= 20 and whole["kept"] <= record["kept"] <= 40
        assert record["error_bound"] < 1e-3
        for name, parts in tokens.items():
            for found, expected in zip(own_tokens[name], parts, strict=True):
                assert torch.isfinite(expected).all() and expected.abs().max() > 0
                assert relative(found, expected) < 1e-9
        assert relative(own_kept, kept) < 1e-9
        assert relative(without_room, kept) < 1e-9
