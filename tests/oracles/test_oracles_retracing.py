"""The differentiable run lands where the recorded did, and its slopes are retraining's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracles
from tests.attributing import relative
from tests.cases.training import MLP, queries_of
from tests.unrolling import (
    NETWORKS,
    OPTIMIZERS,
    Augmented,
    Trained,
    adam,
    adamw,
    differences_of,
    expected_of,
    fetching,
    in_memory,
    record,
    sgd,
)

pytestmark = pytest.mark.filterwarnings("ignore")

CLIPPED = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
OPTIONS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizers": sgd(momentum=0.8, nesterov=True), "gradient_clip_val": 0.5},
    "adamw": {"optimizers": adam(adamw), "accumulate_grad_batches": 2, **CLIPPED},
}


def ones(row: int) -> torch.Tensor:
    return torch.ones(10).double()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_retracing_lands_on_the_recorded_end(name: str, options: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    data = Augmented(network.data(10)) if name == "batch norm" else None
    run, module, data = record(tmp_path, network, data=data, **OPTIONS[options])
    end = oracles.retrace(run, module, oracles.weighted(network.loss, ones), fetching(data))
    last = run.checkpoints[run.last_step]
    found = end.tensors()
    assert ("net.1.running_var" in found) == (name == "batch norm")
    for tensor, value in found.items():
        expected = {**last.parameters, **last.buffers}[tensor]
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["mlp", "dropout", "batch norm", "transformer"])
def test_slopes_are_those_of_retraining(name: str, tmp_path: Path) -> None:
    network, optimizer = NETWORKS[name], sgd(momentum=0.8, weight_decay=0.1)
    run, module, data = record(tmp_path, network, optimizer, gradient_clip_val=1.0)
    queries = network.data(2, seed=7)
    expected = expected_of(run, network, module, data, queries).sum(0)
    found = differences_of(run, module, network.task, data, queries, [0, 5])
    assert relative(found, expected[:, [0, 5]]) < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_eval_mode_it_is_the_older_oracle(name: str) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS[name], clip_norm=0.7)
    work = (run, module, MLP.loss, data, MLP.loss, queries_of(MLP))
    assert relative(oracles.removals(*work).sum(0), oracles.unrolled(*work, clip_norm=0.7)) < 1e-11


def test_the_module_of_a_recorded_run_is_another(tmp_path: Path) -> None:
    _, module, _ = record(tmp_path, NETWORKS["mlp"], sgd())
    assert isinstance(module, Trained) and not module.history
