"""The built-in tasks: losses of single examples as trained, batches, and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from tda_lightning.tasks import (
    AttributionTask,
    ClassificationTask,
    LanguageModelingTask,
    RegressionTask,
    TrainingStepTask,
    seeded_examples,
)
from tests.cases.tasks import (
    BITS,
    CLASSES,
    EXAMPLES,
    INPUTS,
    LABELS,
    LANGUAGE,
    NUMBERS,
    STEPS,
    TASKS,
    LanguageModel,
    Step,
    built,
    one,
    outer_sum,
    per_example_gradients,
    task_case,
)


@pytest.mark.parametrize("name", TASKS)
def test_batch_of_one_gives_the_same_loss(name):
    task, module, batch = task_case(name)
    for method in (task.train_loss, task.measurement):
        losses = method(module, batch)
        alone = torch.cat([method(module, one(batch, index)) for index in range(EXAMPLES)])
        torch.testing.assert_close(losses, alone)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("method", ["train_loss", "measurement", "sampled_loss"])
def test_torch_func_agrees_with_a_plain_loop(name, method):
    task, module, batch = task_case(name)
    indices = torch.arange(10, 10 + EXAMPLES)

    class Call(nn.Module):
        """The loss as a module's forward, so that functional_call can swap its parameters."""

        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, batch, indices):
            with seeded_examples(5, indices):
                return getattr(task, method)(self.inner, batch)

    caller = Call()

    def loss(parameters, batch, index):
        single = torch.utils._pytree.tree_map(lambda value: value[None], batch)
        return functional_call(caller, parameters, (single, index[None]))[0]

    parameters = {name: value.detach() for name, value in caller.named_parameters()}
    batched = vmap(grad(loss), (None, 0, 0))(parameters, batch, indices)
    batched = torch.cat([part.flatten(1) for part in batched.values()], 1)
    plain = per_example_gradients(caller(batch, indices), module)
    torch.testing.assert_close(batched, plain)
    values = vmap(loss, (None, 0, 0))(parameters, batch, indices)
    torch.testing.assert_close(values, caller(batch, indices).detach())


def test_own_task():
    class Logistic(AttributionTask):
        def train_loss(self, module, batch):
            inputs, target = batch
            return F.binary_cross_entropy_with_logits(
                module(inputs), target, reduction="none"
            ).mean(1)

    module, batch = Step(None), (INPUTS, BITS)
    task = Logistic()
    assert not task.can_sample
    with pytest.raises(NotImplementedError, match="sampled_gauss_newton_loss"):
        task.sampled_loss(module, batch)
    trained = Step(STEPS["bce"][0])
    trained.load_state_dict(module.state_dict())
    torch.testing.assert_close(
        outer_sum(task, module, batch, 2), outer_sum(TrainingStepTask(), trained, batch, 2)
    )
    assert task.settings()["class"].endswith("Logistic")
    assert "source" in task.settings()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, CLASSES).double()

    def forward(self, left, right):
        return {"logits": self.net(left + right)}


@pytest.mark.parametrize(
    "batch",
    [
        (INPUTS, INPUTS, LABELS),
        ((INPUTS, INPUTS), LABELS),
        ({"left": INPUTS, "right": INPUTS}, LABELS),
        {"left": INPUTS, "right": INPUTS, "y": LABELS},
        {"inputs": {"left": INPUTS, "right": INPUTS}, "label": LABELS},
    ],
)
def test_batches_of_every_shape(batch):
    module = TwoInputs()
    wanted = F.cross_entropy(module.net(2 * INPUTS), LABELS, reduction="none")
    torch.testing.assert_close(ClassificationTask().train_loss(module, batch), wanted)


def test_margin_is_minus_the_log_odds():
    task, module, batch = task_case("margin")
    assert not task.measures_loss
    assert ClassificationTask().measures_loss
    correct = module(INPUTS).softmax(1).gather(1, LABELS[:, None])[:, 0]
    torch.testing.assert_close(task.measurement(module, batch), ((1 - correct) / correct).log())


def test_predictions():
    task, module, batch = task_case("classification")
    first = module(INPUTS).detach().softmax(1)[0]
    wanted = f"class {int(first.argmax())} ({float(first.max()):.1%})"
    assert task.prediction(module, batch)[0] == wanted
    assert TrainingStepTask().prediction(module, batch)[0] == wanted
    mse = built("mse")
    number = f"{float(mse[0](INPUTS)[0, 0].detach()):.4g}"
    assert RegressionTask().prediction(*mse)[0].startswith(number)
    assert TrainingStepTask().prediction(*mse)[0].startswith(number)
    tokens, module, batch = task_case("tokens")
    perplexity = float(tokens.train_loss(module, batch)[0].detach().exp())
    assert tokens.prediction(module, batch)[0] == f"perplexity {perplexity:.4g}"


def test_settings_are_json():
    import json

    for name in TASKS:
        task, _, _ = task_case(name)
        assert json.loads(json.dumps(task.settings())) == task.settings()
    assert ClassificationTask().settings() != ClassificationTask(label_smoothing=0.1).settings()


WRONG_LABELS = LABELS.clone()
WRONG_LABELS[3] = 9
MODULE = Step(STEPS["mean"][0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ClassificationTask().train_loss(MODULE, (INPUTS, WRONG_LABELS)),
            r"labels in 0 \.\. 3 .* got 9 at position 3",
        ),
        (
            lambda: TrainingStepTask().train_loss(MODULE, (INPUTS, WRONG_LABELS)),
            r"labels in 0 \.\. 3 .* got 9 at position 3",
        ),
        (
            lambda: LanguageModelingTask().train_loss(LanguageModel(), (LANGUAGE, LANGUAGE + 1)),
            r"labels in 0 \.\. 3 .* got 4 at position \(\d, \d\)",
        ),
        (
            lambda: ClassificationTask().train_loss(MODULE, (INPUTS, LABELS[:, None])),
            r"labels of shape \[6\] for logits of shape \[6, 4\], got \[6, 1\]",
        ),
        (
            lambda: ClassificationTask().train_loss(Step(None, 1), (INPUTS, LABELS)),
            "at least 2 classes",
        ),
        (
            lambda: ClassificationTask(class_weights=[1, 2]).train_loss(MODULE, (INPUTS, LABELS)),
            "Expected 4 class_weights",
        ),
        (
            lambda: RegressionTask().train_loss(Step(None, 1), (INPUTS, NUMBERS[:, 0])),
            r"outputs \[6, 1\] and targets \[6\]: broadcasting",
        ),
        (
            lambda: TrainingStepTask().train_loss(
                Step(lambda s, x, y: F.mse_loss(s(x), y), 1), (INPUTS, NUMBERS[:, 0])
            ),
            "Give both the same shape",
        ),
        (lambda: ClassificationTask().train_loss(MODULE, {"a": INPUTS}), "Name the key"),
        (lambda: ClassificationTask().train_loss(MODULE, INPUTS), r"batch \(inputs, target\)"),
        (
            lambda: LanguageModelingTask().train_loss(LanguageModel(), {"tokens": LANGUAGE}),
            "input_ids",
        ),
        (
            lambda: LanguageModelingTask().train_loss(LanguageModel(), (LANGUAGE, LABELS)),
            r"logits \[batch, time, vocabulary\]",
        ),
        (lambda: LanguageModelingTask(reduction="all"), "reduction must be one of"),
        (lambda: RegressionTask(loss="l1"), "loss='mse'"),
        (lambda: ClassificationTask(measure="accuracy"), "'loss' or 'margin'"),
        (lambda: seeded_examples(0, torch.zeros(2)).__enter__(), "integer tensor"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
