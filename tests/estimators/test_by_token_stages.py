"""Scores of single tokens over several stages of training.

The oracle of estimators that multiply gradients: the same scores under a task whose training loss
is that of one position alone, while curvature and measurements stay as they are. Of exact
unrolling: autograd through both stages by a weight for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Scores
from tda_lightning.estimators import MultiStageInfluence, Source, TracIn, Unrolled
from tda_lightning.examples.models.gpt import GPT
from tda_lightning.measurements import Loss
from tda_lightning.tasks import LanguageModelingTask
from tests import oracles
from tests.attributing import quiet, relative
from tests.oracles.stages import TrainedStage, replay_stages
from tests.unrolling import in_eval_mode

EXACT = 1e-8
WORDS, SIZES, LENGTHS = 6, (6, 5), (4, 3)
IGNORED = -100


def texts(size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randint(WORDS, (2, size, length), generator=generator)
    labels[1, 1:] = IGNORED
    return inputs, labels


def sums(outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of each text, a sum over its tokens."""
    return F.cross_entropy(outputs.transpose(1, 2), labels, reduction="none").sum(1)


@dataclass
class OnePosition(LanguageModelingTask):
    """Training losses of one position alone; whatever else is asked is of all of them."""

    position: int = 0

    def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
        return self._token_losses(module, batch)[0][:, self.position]

    def loss_graph(self, module: nn.Module, batch: Any) -> Any:
        return lambda: super(OnePosition, self).train_loss(module, batch), lambda node: node.value

    def measurement(self, module: nn.Module, batch: Any) -> Tensor:
        return self._token_losses(module, batch)[0].sum(1)


def trained(frozen: bool, adam: bool = False) -> list[TrainedStage]:
    """Two stages of one GPT, the second on shorter texts and with a frozen embedding perhaps."""
    torch.manual_seed(0)
    stages: list[TrainedStage] = []
    for number, (size, length) in enumerate(zip(SIZES, LENGTHS, strict=True)):
        data = texts(size, length, seed=number)
        module = GPT(WORDS, max(LENGTHS), 4, 1, 2).double()
        if stages:
            before = stages[-1].trajectory
            module.load_state_dict(before.checkpoints[before.last_step].parameters)
        module.tokens.requires_grad_(not (frozen and number))
        run = oracles.record_run(
            module,
            oracles.loss_of(sums),
            data,
            lambda m: (torch.optim.Adam if adam else torch.optim.SGD)(
                [p for p in m.parameters() if p.requires_grad], lr=0.05
            ),
            oracles.cut_batches(size, 3, epochs=2, seed=number),
            (2,),
        )
        stages.append(TrainedStage(in_eval_mode(run, module), module, sums, data))
    return stages


QUERIES = texts(3, max(LENGTHS), seed=9)


def scored(
    stages: Sequence[TrainedStage], estimator: Any, task: Any = None, **options: Any
) -> Scores:
    attribution = AttributionModule(
        [stage.module for stage in stages],
        [stage.trajectory for stage in stages],
        estimator,
        task or LanguageModelingTask(reduction="sum"),
    )
    return attribution.attribute(
        [TensorDataset(*stage.data) for stage in stages],
        TensorDataset(*QUERIES),
        batch_size=3,
        trainer=quiet(),
        self_influence=False,
        **options,
    )


ESTIMATORS = {
    "tracin": TracIn(),
    "source": Source(num_segments=1),
    "source, recorded": Source(num_segments=1, order="recorded"),
    "multi-stage": MultiStageInfluence(proximity=0.3, relative_damping=0.5),
}


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        pytest.param("tracin", False, marks=pytest.mark.slow),
        ("source", True),
        pytest.param("source", False, marks=pytest.mark.slow),
        pytest.param("source, recorded", True, marks=pytest.mark.slow),
        pytest.param("source, recorded", False, marks=pytest.mark.slow),
        ("multi-stage", True),
        pytest.param("multi-stage", False, marks=pytest.mark.slow),
    ],
)
def test_a_token_counts_as_a_loss_of_its_own(name: str, frozen: bool) -> None:
    stages, estimator = trained(frozen), ESTIMATORS[name]
    found = scored(stages, estimator, by_token="train")
    assert found.by_token is not None and found.by_token.shape == (3, sum(SIZES), max(LENGTHS))
    assert relative(found.by_token.sum(2), found.values) < EXACT
    assert not found.by_token[:, SIZES[0] :, LENGTHS[1] :].any()
    for position in (0, 2):
        task = OnePosition(reduction="sum", position=position)
        expected = scored(stages, estimator, task).values
        assert relative(found.by_token[:, :, position], expected) < EXACT
        assert expected[:, : SIZES[0]].abs().max() > 1e-6
        assert expected[:, SIZES[0] :].abs().max() > 1e-6


@pytest.mark.parametrize("frozen", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_exact_unrolling_splits_by_the_tokens_of_both_stages(frozen: bool) -> None:
    stages = trained(frozen, adam=True)
    found = scored(stages, Unrolled(), by_token="both")
    weights = [
        torch.ones(size, length, dtype=torch.float64, requires_grad=True)
        for size, length in zip(SIZES, LENGTHS, strict=True)
    ]

    def weighted(stage: TrainedStage, own: Tensor) -> TrainedStage:
        """Its data say which rows of the weights are theirs."""
        inputs, labels = stage.data
        numbered = torch.cat([labels, torch.arange(len(labels))[:, None]], 1)

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            losses = F.cross_entropy(outputs.transpose(1, 2), labels[:, :-1], reduction="none")
            return (losses * own[labels[:, -1]]).sum(1)

        return TrainedStage(stage.trajectory, stage.module, loss, (inputs, numbered))

    split = [weighted(stage, own) for stage, own in zip(stages, weights, strict=True)]
    end = replay_stages(split, [torch.ones(size, dtype=torch.float64) for size in SIZES])
    outputs = torch.func.functional_call(stages[-1].module, end, QUERIES[0])
    losses = F.cross_entropy(outputs.transpose(1, 2), QUERIES[1], reduction="none")
    assert found.by_token is not None and found.by_query_token is not None
    for query, measured in enumerate(losses.sum(1)):
        first, second = torch.autograd.grad(-measured, weights, retain_graph=True)
        assert relative(found.by_token[query, : SIZES[0]], first) < EXACT
        assert relative(found.by_token[query, SIZES[0] :, : LENGTHS[1]], second) < EXACT
    assert not found.by_token[:, SIZES[0] :, LENGTHS[1] :].any()
    for query, position in ((0, 0), (1, 0), (2, 3)):
        first, second = torch.autograd.grad(
            -losses[query, position], weights, retain_graph=True, materialize_grads=True
        )
        expected = torch.cat([first.sum(1), second.sum(1)])
        assert relative(found.by_query_token[query, position], expected) < EXACT


@pytest.mark.parametrize(
    "name",
    [
        "multi-stage",
        pytest.param("source", marks=pytest.mark.slow),
        pytest.param("tracin", marks=pytest.mark.slow),
    ],
)
def test_a_token_of_a_query_counts_as_a_query_of_its_own(name: str) -> None:
    stages, estimator = trained(frozen=name != "tracin"), ESTIMATORS[name]
    found = scored(stages, estimator, by_token="both")
    whole = scored(stages, estimator, by_token="train")
    assert found.by_query_token is not None
    assert relative(found.by_token, whole.by_token) < EXACT
    assert relative(found.by_query_token.sum(1), whole.values) < EXACT
    alone = scored(stages, estimator, measurement=Loss(positions=[[0], [0], [3]]))
    for query, position in enumerate((0, 0, 3)):
        assert relative(found.by_query_token[query, position], alone.values[query]) < EXACT
