"""What else exact unrolling answers: late uses, other labels, groups, tokens, own losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning.edits import Relabel, Removal
from tda_lightning.estimators import Unrolled
from tda_lightning.evaluation import measure, retrain
from tda_lightning.tasks import ClassificationTask, LanguageModelingTask
from tests import oracles
from tests.attributing import CaseTask, relative
from tests.cases.training import CLASSIFIER, MLP, queries_of
from tests.unrolling import (
    EXACT,
    NETWORKS,
    OPTIMIZERS,
    Trained,
    adam,
    adamw,
    differences_of,
    everything,
    expected_of,
    fetching,
    in_memory,
    mostly,
    record,
    scores_of,
    sgd,
    token_losses,
    unroll,
)

pytestmark = pytest.mark.filterwarnings("ignore")


# Late uses


@pytest.mark.parametrize("last", [1, 4, 100])
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_only_the_last_steps(name: str, last: int) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS[name])
    first = max(0, run.last_step - last)
    cuts = tuple(sorted({first, *(step for step in run.checkpoints if step > first)}))
    queries = queries_of(MLP)
    late = oracles.removals(run, module, MLP.loss, data, MLP.loss, queries, cuts=cuts)
    scores = unroll(MLP, run, module, data, Unrolled(last_steps=last))
    assert relative(scores.values, late.sum(0)) < EXACT
    early = len(scores.by_segment) - len(late)
    assert not scores.by_segment[:early].any()
    assert relative(scores.by_segment[early:], late) < EXACT
    said = " ".join(scores.provenance["notes"])
    assert (f"last {last} of {run.last_step} steps" in said) == (last < run.last_step)


def test_the_last_steps_of_a_run_in_train_mode(tmp_path: Path) -> None:
    network = NETWORKS["batch norm"]
    run, module, data = record(tmp_path, network, OPTIMIZERS["adamw"])
    queries = network.data(2, seed=7)
    scores = scores_of(run, module, data, queries, network.task, Unrolled(last_steps=3))
    expected = expected_of(run, network, module, data, queries, cuts=(3, 4, 6))
    assert not scores.by_segment[0].any()
    assert relative(scores.by_segment[1:], expected) < EXACT


# Other labels


@pytest.mark.parametrize(
    ("network", "name"),
    mostly(["mlp", "dropout", "batch norm"], ["momentum and decay", "adamw"], kept=["adamw"]),
)
def test_other_labels(network: str, name: str, tmp_path: Path) -> None:
    """The derivative for the loss (1 - w) l(old label) + w l(new label) at w = 0."""
    chosen = NETWORKS[network]
    run, module, data = record(
        tmp_path, chosen, OPTIMIZERS[name], gradient_clip_val=1.0, accumulate_grad_batches=2
    )
    queries = chosen.data(2, seed=7)
    if network == "batch norm":
        labels: dict[int, Any] = {n: (int(data[n][1]) + 1) % 3 for n in (1, 4, 9)}
    else:
        labels = {n: (data[n][1] + torch.tensor([0.5, -1.0])).tolist() for n in (1, 4, 9)}
    renamed = data.tensors[1].clone()
    for n, label in labels.items():
        renamed[n] = torch.as_tensor(label, dtype=renamed.dtype)
    amounts = torch.zeros(10, dtype=torch.float64, requires_grad=True)

    def objective(module: nn.Module, batch: Any, examples: Tensor, row: int) -> Tensor:
        outputs = module(batch[0])
        as_if = lambda labels: chosen.loss(lambda _: outputs, (batch[0], labels))  # noqa: E731
        old, new = as_if(batch[1]), as_if(renamed[examples])
        return (old + amounts[examples] * (new - old)).mean()

    end = oracles.retrace(run, module, objective, fetching(data))
    measured = end.measure(chosen.loss, everything(queries))
    removals = expected_of(run, chosen, module, data, queries).sum(0)
    expected = torch.cat(
        [oracles.slopes(measured, amounts)[:, list(labels)], removals[:, [4, 2]]], dim=1
    )
    edits = [*(Relabel(index, label) for index, label in labels.items()), Removal(4), Removal(2)]
    scores = scores_of(run, module, data, queries, chosen.task, edits=edits)
    assert relative(scores.values, expected) < EXACT
    assert relative(scores.by_segment.sum(0), expected) < EXACT
    records = scores.provenance["edits"]
    assert [record["index"] for record in records] == [1, 4, 9, 4, 2]
    assert records[0]["kind"] == "Relabel" and records[3]["kind"] == "Removal"


class Mixed(CaseTask):
    """Part of the loss of one example is that of its other label."""

    example: int = -1
    other: Any = None
    part: float = 0.0

    def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
        inputs, labels, numbers = batch
        outputs = module(inputs)
        old, new = (
            F.cross_entropy(outputs, chosen, reduction="none")
            for chosen in (labels, torch.full_like(labels, self.other))
        )
        return old + self.part * (numbers == self.example) * (new - old)


def test_another_label_predicts_retraining_with_it() -> None:
    run, module, data = in_memory(CLASSIFIER, OPTIMIZERS["adamw"])
    queries, example = queries_of(CLASSIFIER), 3
    other = 1 - int(data[1][example])
    scores = unroll(CLASSIFIER, run, module, data, edits=[Relabel(example, other)])
    ends = []
    for part in (1e-5, -1e-5):
        task = Mixed("classification")
        task.example, task.other, task.part = example, other, part
        numbered = TensorDataset(*data, torch.arange(10))
        state = retrain(run, module, task, numbered, torch.ones(10).double())
        ends.append(measure(module, CaseTask("classification"), state, TensorDataset(*queries)))
    assert relative(scores.values[:, 0], (ends[0] - ends[1]) / 2e-5) < 1e-6


def test_labels_that_are_not_there_are_refused() -> None:
    run, module, data = in_memory(CLASSIFIER, OPTIMIZERS["sgd"])
    with pytest.raises(ValueError, match="Edit 0, Relabel, names training example 10"):
        unroll(CLASSIFIER, run, module, data, edits=[Relabel(10, 0)])
    with pytest.raises(ValueError, match="ask for one of them at a time"):
        unroll(CLASSIFIER, run, module, data, Unrolled(token_weights=True), edits=[Removal(1)])
    for label in (7, [0, 1]):
        with pytest.raises(ValueError, match="label"):
            unroll(
                CLASSIFIER, run, module, data, edits=[Relabel(1, label)], task=ClassificationTask()
            )


# Groups


def test_a_group_is_one_common_weight(tmp_path: Path) -> None:
    network = NETWORKS["dropout"]
    run, module, data = record(tmp_path, network, OPTIMIZERS["adamw"])
    queries = network.data(2, seed=7)
    groups = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0, 1])
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    objective = oracles.weighted(network.loss, lambda row: weights[groups])
    end = oracles.retrace(run, module, objective, fetching(data))
    expected = -oracles.slopes(end.measure(network.loss, everything(queries)), weights)
    scores = scores_of(run, module, data, queries, network.task)
    assert relative(scores.by_group(groups).values, expected) < EXACT


# Tokens


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_tokens(name: str, reduction: str, tmp_path: Path) -> None:
    chosen = NETWORKS["transformer"]
    factor = 4 if reduction == "sum" else 1

    def losses(module: nn.Module, batch: Any) -> Tensor:
        return factor * token_losses(module, batch)

    def summed(module: nn.Module, batch: Any) -> Tensor:
        return losses(module, batch).sum(1)

    module = Trained(chosen.module(sgd()).net, summed, OPTIMIZERS[name])
    run, module, data = record(tmp_path, chosen, OPTIMIZERS[name], module=module)
    queries = chosen.data(2, seed=7)
    expected = oracles.removals(
        run, module, losses, fetching(data), summed, everything(queries), parts=4
    ).sum(0)
    task = LanguageModelingTask(reduction)
    scores = scores_of(run, module, data, queries, task, Unrolled(token_weights=True))
    assert scores.by_token.shape == (2, 10, 4)
    assert relative(scores.by_token, expected) < EXACT
    assert relative(scores.by_token.sum(2), scores.values) < EXACT
    plain = scores_of(run, module, data, queries, task)
    assert getattr(plain, "by_token", None) is None
    assert relative(plain.values, scores.values) < EXACT


def test_tokens_without_a_target_have_no_score(tmp_path: Path) -> None:
    """Padded positions, and a mean over the tokens of the whole batch."""

    class Padded(Trained):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, labels = batch
            return F.cross_entropy(self(inputs).flatten(0, 1), labels.flatten())

    chosen, optimizer = NETWORKS["transformer"], OPTIMIZERS["adamw"]
    (numbers,) = chosen.data(10).tensors
    labels = numbers[:, 1:].clone()
    for n in range(10):
        labels[n, 4 - n % 3 :] = -100
    data = TensorDataset(numbers[:, :-1], labels)
    module = Padded(chosen.module(optimizer).net, chosen.losses, optimizer).double()
    run, module, _ = record(tmp_path, chosen, optimizer, data=data, module=module)

    def each(module: nn.Module, batch: Any) -> Tensor:
        logits, kept = module(batch[0]), batch[1] != -100
        chosen = batch[1].clamp(min=0)[..., None]
        return -logits.log_softmax(-1).gather(-1, chosen)[..., 0] * kept

    def losses(module: nn.Module, batch: Any) -> Tensor:
        """Such that the mean over examples of the sum over positions is the mean over tokens."""
        return each(module, batch) * len(batch[1]) / (batch[1] != -100).sum()

    def own_mean(module: nn.Module, batch: Any) -> Tensor:
        return each(module, batch).sum(1) / (batch[1] != -100).sum(1)

    queries = TensorDataset(*(t[:2] for t in data.tensors))
    expected = oracles.removals(
        run, module, losses, fetching(data), own_mean, everything(queries), parts=4
    ).sum(0)

    class Measured(LanguageModelingTask):
        """The run's loss; queries by the mean over their own tokens."""

        def measurement(self, module: nn.Module, batch: Any) -> Tensor:
            losses, counted = self._token_losses(module, batch)
            return losses.sum(1) / counted

    scores = scores_of(run, module, data, queries, Measured("batch"), Unrolled(token_weights=True))
    assert relative(scores.by_token, expected) < EXACT
    assert not scores.by_token[:, data.tensors[1] == -100].any()


# The module's own training step


class Regularised(Trained):
    """Adds to the loss what belongs to no example."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self(batch[0]), batch[1])
        total = loss + penalty(self)
        self.history.append(total.item())
        self.log_dict({"loss": loss, "penalty": total - loss})
        return total


def penalty(module: nn.Module) -> Tensor:
    return 0.05 * sum(p.pow(4).sum() + p.abs().sum() for p in module.parameters())


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_a_regulariser_is_part_of_the_training(name: str, tmp_path: Path) -> None:
    network, optimizer = NETWORKS["dropout"], OPTIMIZERS[name]

    def make(seed: int) -> Trained:
        return Regularised(network.module(optimizer, seed).net, network.losses, optimizer)

    run, _, data = record(tmp_path, network, optimizer, module=make(3), accumulate_grad_batches=2)
    queries, module = network.data(2, seed=7), make(4)
    expected = expected_of(run, network, module, data, queries, added=penalty)
    without = expected_of(run, network, module, data, queries)
    assert relative(without, expected) > 0.02
    scores = scores_of(run, module, data, queries, None)
    assert relative(scores.by_segment, expected) < EXACT
    assert scores.provenance["certificate"]["bit_equal"]
    # The task that leaves the penalty out is not the run's.
    with pytest.raises(ValueError, match="loss"):
        scores_of(run, module, data, queries, network.task)


class Weighted(Trained):
    """Classes count differently, and a batch is divided by its own sum of weights."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        criterion = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1)
        return {"loss": criterion(self(batch[0]), batch[1])}


CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def test_class_weights_divide_a_batch_by_its_own_sum(tmp_path: Path) -> None:
    network, optimizer = NETWORKS["batch norm"], adam(adamw)

    def make(seed: int) -> Trained:
        return Weighted(network.module(optimizer, seed).net, network.losses, optimizer)

    run, _, data = record(tmp_path, network, optimizer, module=make(3))
    queries, module = network.data(2, seed=7), make(4)
    assert (
        len({round(float(CLASS_WEIGHTS[data.tensors[1][b]].sum()), 3) for b in _batches(run)}) > 1
    )

    def losses(module: nn.Module, batch: Any) -> Tensor:
        logits, labels = module(batch[0]).log_softmax(-1), batch[1]
        own = CLASS_WEIGHTS[labels]
        hard = -own * logits.gather(1, labels[:, None])[:, 0]
        smooth = -(logits * CLASS_WEIGHTS).sum(1) / 3
        return (0.9 * hard + 0.1 * smooth) * len(labels) / own.sum()

    # A measurement of its own: the loss of a single query under class weights is ambiguous.
    class Measured(ClassificationTask):
        def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
            return losses(module, batch)

        def measurement(self, module: nn.Module, batch: Any) -> Tensor:
            return network.loss(module, batch)

    expected = expected_of(run, network, module, data, queries, losses=losses)
    scores = scores_of(run, module, data, queries, Measured())
    assert relative(scores.by_segment, expected) < EXACT
    # Through the training step itself, whose queries are divided by the first batch's weights.
    own = scores_of(run, module, data, queries, None)
    found = differences_of(run, module, Measured(), data, queries, [2])
    assert relative(scores.values[:, [2]], found) < 1e-5
    factor = CLASS_WEIGHTS[data.tensors[1]].mean()

    def measured(module: nn.Module, batch: Any) -> Tensor:
        return losses(module, batch) * CLASS_WEIGHTS[batch[1]].sum() / len(batch[1]) / factor

    expected = oracles.removals(run, module, losses, fetching(data), measured, everything(queries))
    assert relative(own.by_segment, expected) < EXACT


def _batches(run: Any) -> list[Tensor]:
    return [batch for row in range(len(run.steps)) for batch in run.steps.batches(row)]


class Counting(Trained):
    """Looks at numbers, draws, and logs: nothing of it reaches the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        accuracy = (outputs.argmax(1) == batch[1]).double().mean().item()
        self.history.append(accuracy + loss.detach().cpu().numpy().item())
        self.log("accuracy", accuracy, prog_bar=True, on_epoch=True)
        torch.rand(3)
        return loss


def test_a_training_step_that_looks_logs_and_draws(tmp_path: Path) -> None:
    network, optimizer = NETWORKS["batch norm"], OPTIMIZERS["nesterov"]

    def make(seed: int) -> Trained:
        return Counting(network.module(optimizer, seed).net, network.losses, optimizer)

    run, _, data = record(tmp_path, network, optimizer, module=make(3))
    queries, module = network.data(2, seed=7), make(4)
    scores = scores_of(run, module, data, queries, None)
    expected = expected_of(run, network, module, data, queries)
    assert relative(scores.by_segment, expected) < EXACT
    assert scores.provenance["certificate"]["bit_equal"]
